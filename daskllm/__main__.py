"""``python -m daskllm``: the command line."""

from daskllm.cli import main

if __name__ == "__main__":
    main()
