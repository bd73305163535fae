"""Settings of the property tests: the same examples in every run, and no limit on time, which tests never assert."""

from hypothesis import settings

settings.register_profile("volseg", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("volseg")
