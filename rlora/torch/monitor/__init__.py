"""Figures of what a step does to every pair, and sentences about them."""
