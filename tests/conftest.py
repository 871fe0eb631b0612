"""What all tests share."""
import torch

# Small tensors gain nothing from threads, and threads that wait for busy cores lose much.
torch.set_num_threads(1)
