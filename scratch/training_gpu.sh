#!/bin/sh
# Check and time the gradients on a GPU, and try launch options of the attention's: under 3 minutes.
#     sh scratch/training_gpu.sh OUT.json
set -e
cd "$(dirname "$0")/.."
PYTHONPATH=engine:kernels:bench python scratch/training_gpu.py "${1:-training.json}"
