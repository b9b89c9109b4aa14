from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter

class MoELayer(MegatronModule):
    router: TopKRouter
