"""`python -m procs.cli`: the `sgnode` command by an interpreter's path, which may go through a symlink."""

from procs.cli.main import main

if __name__ == "__main__":
    main()
