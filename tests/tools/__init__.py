"""What stands beside the service: the command line, the servers for development, load and benchmarks."""
