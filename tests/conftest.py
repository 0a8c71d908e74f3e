import torch

# Tiny models gain nothing from a second thread, and threads that wait for each other on a busy machine cost minutes.
torch.set_num_threads(1)
