"""`python -m shared.export`."""

from shared.export.export import main

if __name__ == "__main__":
    main()
