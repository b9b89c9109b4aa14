from triton.runtime.autotuner import Config as Config
from triton.runtime.autotuner import autotune as autotune
from triton.runtime.jit import JITFunction as JITFunction
from triton.runtime.jit import jit as jit

def cdiv(x: int, y: int) -> int: ...
