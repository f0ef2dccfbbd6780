"""`python -m fastercache` is the command `fastercache`; torchrun starts it so."""

from fastercache.cli import app

if __name__ == "__main__":
    app()
