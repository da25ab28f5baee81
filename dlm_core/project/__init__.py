"""The repository's own commands, behind ``python -m dlm_core``."""
