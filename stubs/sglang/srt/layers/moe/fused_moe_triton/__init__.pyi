from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE as FusedMoE
