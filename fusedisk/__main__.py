"""``python -m fusedisk`` is the ``fusedisk`` command."""

from fusedisk.cli import main

if __name__ == "__main__":
    main()
