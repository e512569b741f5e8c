"""What helps with the work on the clone; none of it is installed."""
