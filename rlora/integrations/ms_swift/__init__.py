"""The plugin file for ms-swift, in a folder of its own: ms-swift puts that on ``sys.path``."""

from pathlib import Path

PLUGIN = str(Path(__file__).with_name("rlora_ms_swift.py"))
"""For ``--external_plugins``."""
