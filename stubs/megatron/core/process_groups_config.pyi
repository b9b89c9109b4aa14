from torch.distributed import ProcessGroup

class ProcessGroupCollection:
    cp: ProcessGroup
