"""Starts of LoRA layers, and adapters that are saved otherwise than they were trained."""
