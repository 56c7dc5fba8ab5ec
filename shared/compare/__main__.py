"""`python -m shared.compare`."""

from shared.compare.table import main

if __name__ == "__main__":
    main()
