"""Two sites on one machine, for `nebula-mp demo` and for the end-to-end tests."""
