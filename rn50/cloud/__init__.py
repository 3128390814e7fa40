"""One run on one EC2 instance. Imports no torch; runs with boto3 and pyyaml alone."""
