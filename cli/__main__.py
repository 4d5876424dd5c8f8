"""``python -m omniport.cli``: the command where ``omniport`` is not on the PATH."""

from .main import run

if __name__ == "__main__":
    run()
