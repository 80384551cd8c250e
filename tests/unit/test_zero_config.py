"""DeepSpeed's configuration as it follows from a layout and a recipe, and what a recipe may lay over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from outgrow.contracts import Layout
from outgrow.errors import SiteError
from outgrow.recipes.deepspeed import deepspeed_config, extensions_folder, folders, merged
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.deepspeed_keys import DECIDED, KEYS
from outgrow.recipes.schema.site import Site
from outgrow.torchvision import ensure_importable

LAYOUT = Layout(engine="zero", world=4, replicate=1, shard=4, global_rows=30, micro_rows=2, accumulation=4)


def recipe(**parallel: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "schema": 1,
            "run": {"name": "case", "seed": 1},
            "model": {"kind": "architecture", "family": "llama"},
            "data": {
                "sequence_length": 8,
                "tokenizer": {"kind": "folder", "path": "none"},
                "streams": [{"name": "none", "source": {"kind": "text", "path": "none"}}],
            },
            "batch": {"rows": 30},
            "duration": {"steps": 3},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3, "clip_norm": 0.7},
            "precision": "bf16",
            "parallel": {"kind": "zero", **parallel},
        }
    )


def config(**parallel: Any) -> dict[str, Any]:
    return deepspeed_config(LAYOUT, recipe(**parallel), "/disk/rank", largest_tensor=1001)


def test_it_follows_from_layout_and_recipe() -> None:
    found = config(stage=2)
    assert found["train_batch_size"] == 32 == 4 * found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"]
    assert (found["gradient_clipping"], found["bf16"], found["communication_data_type"]) == (0.7, {"enabled": True}, "fp32")
    assert found["zero_optimization"]["stage"] == 2
    assert "offload" not in str(found)


def test_gradients_are_summed_where_deepspeed_can() -> None:
    assert [config(stage=stage)["gradient_allreduce_op"] for stage in (1, 2, 3)] == ["sum", "sum", "mean"]


def test_what_is_offloaded_to_a_disk_goes_there_all_of_it() -> None:
    zero = config(stage=3, offload_optimizer="nvme", offload_parameters="nvme")["zero_optimization"]
    assert zero["offload_optimizer"]["nvme_path"] == zero["offload_param"]["nvme_path"] == "/disk/rank"
    assert zero["offload_param"]["max_in_cpu"] == 0
    assert zero["offload_param"]["buffer_size"] == 251, "a quarter of the largest parameter, rounded up"


def test_keys_are_laid_over_without_losing_the_others() -> None:
    zero = config(stage=3, deepspeed={"zero_optimization": {"reduce_bucket_size": 7, "sub_group_size": 9}})["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["sub_group_size"], zero["stage"], zero["overlap_comm"]) == (7, 9, 3, True)
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": {"e": 4}}, "d": {}}) == {"a": {"b": 1, "c": {"e": 4}}, "d": {}}


def nested(path: str) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {head: nested(rest) if rest else 1}


@pytest.mark.parametrize("key", DECIDED)
def test_what_the_recipe_decides_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValidationError) as refused:
        recipe(deepspeed=nested(key))
    assert f"{key} is decided by the recipe; set {DECIDED[key]}" in str(refused.value)


def test_what_lies_below_a_decided_key_is_refused_too() -> None:
    with pytest.raises(ValidationError, match=r"optimizer.params.lr is decided by the recipe; set optimizer"):
        recipe(deepspeed={"optimizer": {"params": {"lr": 1.0}}})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimisation": {}}, r"zero_optimisation: did you mean zero_optimization\? Allowed: zero_optimization, aio"),
        ({"progressive_layer_drop": {"enabled": True}}, r"progressive_layer_drop: cannot be set here"),
        ({"zero_optimization": 3}, r"zero_optimization is 3; allowed: keys and values"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r"reduce_bucket_size is 'auto'; allowed: a whole number"),
        ({"zero_optimization": {"stage3_max_live_parameters": float("nan")}}, r"stage3_max_live_parameters is nan"),
        ({"zero_optimization": {"reduce_bucket": 7}}, r"zero_optimization.reduce_bucket: did you mean reduce_bucket_size\?"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, r"zero_optimization.overlap_comm is 'yes'; allowed: true or false"),
        ({"zero_optimization": {"offload_param": {"buffers": 2}}}, r"offload_param.buffers: .*Allowed: buffer_count"),
        ({"aio": 3}, r"aio is 3; allowed: keys and values"),
        ({"aio": {"thread_count": -3}}, r"aio.thread_count: cannot be set here Allowed: block_size, queue_depth"),
        ({"aio": {"block_size": "hello"}}, r"aio.block_size is 'hello'; allowed: a whole number of at least 1"),
        ({"aio": {"queue_depth": 8.0}}, r"aio.queue_depth is 8.0; allowed: a whole number of at least 1"),
        ({"aio": {"intra_op_parallelism": 0}}, r"aio.intra_op_parallelism is 0; allowed: a whole number of at least 1"),
        ({"aio": {"overlap_events": 1}}, r"aio.overlap_events is 1; allowed: true or false"),
        ({"wall_clock_breakdown": "maybe"}, r"wall_clock_breakdown is 'maybe'; allowed: true or false"),
        ({"steps_per_print": 0}, r"steps_per_print is 0; allowed: a whole number of at least 1"),
        ({"steps_per_print": True}, r"steps_per_print is True; allowed: a whole number of at least 1"),
        ({"log_level": "loud"}, r"log_level is 'loud'; allowed: debug, info, warning, error or critical"),
        ({"log_level": ["info"]}, r"log_level is \['info'\]; allowed: debug, info"),
        ({"comms_logger": {"prof_ops": "all_reduce"}}, r"comms_logger.prof_ops is 'all_reduce'; allowed: a list of names"),
        ({"flops_profiler": {"module_depth": 0}}, r"module_depth is 0; allowed: a whole number of at least 1, or -1 for all"),
        ({"flops_profiler": {"recompute_fwd_factor": -1}}, r"recompute_fwd_factor is -1; allowed: a number of at least 0"),
        ({"flops_profiler": {"output_file": 7}}, r"flops_profiler.output_file is 7; allowed: the path of a file"),
        ({"timers": {"throughput": True}}, r"timers.throughput is True; allowed: keys and values"),
        ({"zero_optimization": {3: True}}, r"zero_optimization.3: cannot be set here Allowed: contiguous_gradients"),
    ],
)
def test_what_deepspeed_would_pass_over_or_stumble_on_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        recipe(deepspeed=given)


def test_each_key_of_the_section_that_deepspeed_checks_is_either_free_or_decided() -> None:
    ensure_importable()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    sections = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    }
    theirs = {
        f"{section}.{field.alias or name}" for section, model in sections.items() for name, field in model.model_fields.items()
    }
    ours = {path for path in (*KEYS, *DECIDED) if path.startswith("zero_optimization.")}
    assert theirs == ours
    assert not set(KEYS) & set(DECIDED)


def test_each_key_of_the_other_sections_is_one_that_deepspeed_reads() -> None:
    ensure_importable()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
    from deepspeed.utils.logging import log_levels

    theirs = {
        "aio": set(AIO_DEFAULT_DICT),
        "comms_logger": set(CommsLoggerConfig.model_fields),
        "flops_profiler": set(vars(DeepSpeedFlopsProfilerConfig({}))),
        "timers.throughput": set(DeepSpeedThroughputTimerConfig.model_fields),
    }
    for section, keys in theirs.items():
        ours = {path.removeprefix(f"{section}.") for path in KEYS if path.startswith(f"{section}.")}
        assert ours == keys, section
    for level in log_levels:
        assert config(deepspeed={"log_level": level})["log_level"] == level


def test_what_changes_nothing_that_is_learned_may_be_set() -> None:
    aio = {"block_size": 1 << 20, "queue_depth": 8, "single_submit": False}
    given = {
        "wall_clock_breakdown": True,
        "aio": aio,
        "flops_profiler": {"module_depth": -1},
        "zero_optimization": {"reduce_bucket_size": 1e6, "offload_param": {}},
    }
    assert config(stage=3, deepspeed=given)["wall_clock_breakdown"] is True


def test_a_disk_is_the_first_tier_or_none(tmp_path: Path) -> None:
    offloads = recipe(stage=3, offload_optimizer="nvme")
    with pytest.raises(SiteError, match="declares no disk") as refused:
        folders(offloads, Site.model_validate({"cache": str(tmp_path)}))
    assert "tiers: [{name: nvme" in refused.value.hint
    tiers = [{"name": "fast", "path": str(tmp_path / "fast")}, {"name": "slow", "path": str(tmp_path / "slow")}]
    site = Site.model_validate({"cache": str(tmp_path), "tiers": tiers})
    assert folders(offloads, site).offload == tmp_path / "fast/offload"
    assert folders(recipe(stage=3), site).offload is None


def test_extensions_are_kept_by_version(tmp_path: Path) -> None:
    folder = extensions_folder(tmp_path)
    assert folder.parent == tmp_path / "extensions"
    assert "deepspeed-0" in folder.name
    assert "torch-2" in folder.name
