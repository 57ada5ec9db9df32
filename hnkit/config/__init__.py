"""What a training run is told: one frozen record, from defaults, a preset, a TOML file and flags, strictly typed.

Later sources win: the dataclasses' defaults, the backend's preset `default`, `--preset`, the file, the flags. An
unknown key, a wrong type or a value out of range is an `InputError` of one line that names the key and what is
accepted. An import path (`pkg.mod:fn`) is code, so it is taken from flags alone, never from a file or a preset; so is
leave to download. A relative path in a file is looked for beside that file first, then in the working directory.
"""

from hnkit.config.records import (
    CONFIG_FILE,
    PERMISSIONS,
    GenerateSettings,
    RewardSpec,
    RunConfig,
    Scalar,
    TrainConfig,
    config_toml,
)
from hnkit.config.resolve import (
    differing_keys,
    make_options,
    own_rewards,
    reproducing_command,
    resolve_config,
    resume_command,
)
from hnkit.config.sources import (
    PLACES,
    parse_options,
    parse_reward_flag,
    read_tables,
    split_model,
    split_permissions,
)

__all__ = [
    "CONFIG_FILE",
    "PERMISSIONS",
    "PLACES",
    "GenerateSettings",
    "RewardSpec",
    "RunConfig",
    "Scalar",
    "TrainConfig",
    "config_toml",
    "differing_keys",
    "make_options",
    "own_rewards",
    "parse_options",
    "parse_reward_flag",
    "read_tables",
    "reproducing_command",
    "resolve_config",
    "resume_command",
    "split_model",
    "split_permissions",
]
