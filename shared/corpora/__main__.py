"""`python -m shared.corpora`."""

from shared.corpora.build import main

if __name__ == "__main__":
    main()
