"""OverLoCK in Jittor (torch_impl: in PyTorch). models.py is the network, train.py the program."""
