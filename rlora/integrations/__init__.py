"""Plug-ins that trainers load by name: a module for each, imported by the trainer only."""
