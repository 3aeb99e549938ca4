"""Print the configuration reference, as the README has it: ``python -m bloomft.config``."""

from bloomft.config.schema import reference_table

if __name__ == "__main__":
    print(reference_table())
