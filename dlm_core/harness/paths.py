"""Where the checkout lies, for what is only useful in one: figures, notebooks, the store of
finished trials.
"""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
