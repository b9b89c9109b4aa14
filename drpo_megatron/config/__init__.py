"""The configuration of a run: schema, loading, cross-checks. No torch, no transformers: commands must start fast."""

from drpo_megatron.config.checks import check_config, check_evaluation
from drpo_megatron.config.load import ConfigError, FieldHelp, dump_config, field_help, load_config, setting_reference
from drpo_megatron.config.run_notes import notes
from drpo_megatron.config.schema import DataConfig, RewardConfig, RunConfig, TrackingConfig

__all__ = [
    "ConfigError",
    "DataConfig",
    "FieldHelp",
    "RewardConfig",
    "RunConfig",
    "TrackingConfig",
    "check_config",
    "check_evaluation",
    "dump_config",
    "field_help",
    "load_config",
    "notes",
    "setting_reference",
]
