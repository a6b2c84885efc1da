"""What the operations cost, measured: figures are in `results/`, and each is made again by one command."""
