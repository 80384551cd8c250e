"""Where a site file is found, what it becomes, how secrets stay hidden, and how a recipe's names become folders."""

from __future__ import annotations

import os
import pickle
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from outgrow.contracts import Disk, DiskKind, Gpu, Inventory
from outgrow.errors import SiteError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema.sizes import parse_rate
from outgrow.recipes.site_init import init_site
from outgrow.recipes.site_loading import bind, find_site, load_site, recipe_names

GIB = 2**30


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "schema": 1,
            "run": {"name": "tiny", "seed": 1},
            "model": {"kind": "folder", "path": "base"},
            "data": {
                "sequence_length": 16,
                "tokenizer": {"kind": "folder", "path": "base"},
                "streams": [
                    {"name": "a", "source": {"kind": "text", "path": "texts"}},
                    {"name": "b", "source": {"kind": "jsonl", "path": "more/lines.jsonl"}},
                    {"name": "c", "source": {"kind": "custom", "factory": "mine:read"}},
                ],
            },
            "batch": {"rows": 8},
            "duration": {"steps": 5},
            "optimizer": {"kind": "adamw", "learning_rate": 0.1},
        }
        | sections
    )


def test_the_site_is_the_given_one_else_the_folders_else_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    assert find_site(None, folder) is None
    users = write(tmp_path / "home/.config/outgrow/site.yaml", "")
    assert find_site(None, folder) == users
    other = write(tmp_path / "xdg/outgrow/site.yaml", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert find_site(None, folder) == other
    local = write(folder / "site.yaml", "")
    assert find_site(None, folder) == local
    assert find_site(tmp_path / "absent.yaml", folder) == tmp_path / "absent.yaml"
    with pytest.raises(SiteError, match="there is no such file"):
        load_site(tmp_path / "absent.yaml")


def test_without_a_file_the_defaults_are_below_the_home_folder(tmp_path: Path) -> None:
    site = load_site(None)
    assert site.storage == str(tmp_path / "home/.local/share/outgrow")
    assert site.cache == str(tmp_path / "home/.cache/outgrow")
    assert site.cluster.token_file == str(tmp_path / "home/.ray/auth_token")
    assert site.sources == {"python-stdlib": sysconfig.get_path("stdlib")}


def test_folders_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "conf/site.yaml",
        "storage: ../store\ncache: cache\ncluster: {token_file: t}\n"
        "sources: {a: ~/a, b: s3://bucket/b, c: /c/, python-stdlib: /own}",
    )
    site = load_site(Path("conf/site.yaml"))
    assert site.storage == str(tmp_path / "store")
    assert site.cache == str(tmp_path / "conf/cache")
    assert site.cluster.token_file == str(tmp_path / "conf/t")
    assert site.sources == {"a": str(tmp_path / "home/a"), "b": "s3://bucket/b", "c": "/c", "python-stdlib": "/own"}


def test_environment_variables_fill_folders_and_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "models")
    monkeypatch.setenv("THE_KEY", "hunter2")
    path = write(
        tmp_path / "site.yaml",
        "storage: s3://${env:BUCKET}/x-${env:BUCKET}\n"
        "storage_options: {secret: '${env:THE_KEY}', endpoint_url: 'http://localhost:1', anon: false, retries: 3}\n"
        "sources: {a: '/data/${env:BUCKET}'}\n",
    )
    site = load_site(path)
    assert site.storage == "s3://models/x-models"
    assert site.sources["a"] == "/data/models"
    assert site.to_dict()["storage_options"] == {
        "secret": "hunter2",
        "endpoint_url": "http://localhost:1",
        "anon": False,
        "retries": 3,
    }


def test_a_secret_is_seen_nowhere_but_in_the_plain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "hunter2")
    site = load_site(write(tmp_path / "site.yaml", "storage_options: {aws_secret: '${env:THE_KEY}'}"))
    on_a_worker = Site.model_validate(pickle.loads(pickle.dumps(site.to_dict())))
    for one in (site, on_a_worker):
        assert one.to_dict()["storage_options"] == {"aws_secret": "hunter2"}
        assert "hunter2" not in f"{one!r} {one} {one.model_dump_json()}"
    assert on_a_worker == site


def test_urls_of_monitoring_may_be_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", "https://chat.example/hunter2")
    text = "monitoring: {alert_webhook: '${env:HOOK}', remote_write: {url: 'https://me:hunter2@home.example/write'}}"
    site = load_site(write(tmp_path / "site.yaml", text))
    on_a_worker = Site.model_validate(pickle.loads(pickle.dumps(site.to_dict())))
    for one in (site, on_a_worker):
        data = one.to_dict()["monitoring"]
        assert data["alert_webhook"] == "https://chat.example/hunter2"
        assert data["remote_write"]["url"] == "https://me:hunter2@home.example/write"
        assert "hunter2" not in f"{one!r} {one} {one.model_dump_json()}"
    assert on_a_worker == site
    assert Site().to_dict()["monitoring"]["alert_webhook"] == ""


def test_tiers_have_folders_relative_to_the_file_and_secrets_out_of_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "hunter2")
    path = write(
        tmp_path / "conf/site.yaml",
        "tiers:\n"
        "- {name: nvme, path: ../fast, capacity: 1.5 TB, reserve: 64 MiB, run_cache: 500 GB}\n"
        "- {name: hdd, path: ~/hdd, speed: 180 MB/s, limit: 100 Mbit/s}\n"
        "- {name: far, path: 's3://bucket/x', options: {secret: '${env:THE_KEY}', anon: false}}\n"
        "place: {datasets: [nvme], checkpoints: [hdd, far]}\n",
    )
    site = load_site(path)
    on_a_worker = Site.model_validate(pickle.loads(pickle.dumps(site.to_dict())))
    assert on_a_worker == site
    for one in (site, on_a_worker):
        nvme, hdd, far = one.tiers
        assert [tier.path for tier in one.tiers] == [str(tmp_path / "fast"), str(tmp_path / "home/hdd"), "s3://bucket/x"]
        assert (nvme.capacity_bytes, nvme.reserve_bytes, nvme.run_cache_bytes) == (1.5e12, 64 * 2**20, 5e11)
        assert (hdd.bytes_per_s, hdd.limit_bytes_per_s, hdd.capacity_bytes, hdd.num_parallel) == (180e6, 12.5e6, None, 1)
        assert (far.reserve_bytes, far.num_parallel, far.is_bucket) == (0, 8, True)
        assert one.to_dict()["tiers"][2]["options"] == {"secret": "hunter2", "anon": False}
        assert one.place.checkpoints == ("hdd", "far")
        assert "hunter2" not in f"{one!r} {one} {one.model_dump_json()}"


@pytest.mark.parametrize("text", ["0 MB/s", "MB/s", "3 mb/s", "180 MB", "-1 MB/s", "1e3 MB/s"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: a rate such as 180 MB/s or 100 Mbit/s"):
        parse_rate(text)


def test_what_an_environment_variable_holds_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "hunter2")
    with pytest.raises(SiteError) as caught:
        load_site(write(tmp_path / "site.yaml", "cache: 'http://${env:THE_KEY}'"))
    assert "http://${env:THE_KEY}" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_storage_that_fsspec_cannot_open_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="a URL that begins with s4:// cannot be opened here"):
        load_site(write(tmp_path / "site.yaml", "storage: s4://bucket")).open_storage()


def test_names_become_folders(tmp_path: Path) -> None:
    write(tmp_path / "recipes/more/lines.jsonl", "")
    site = Site(sources={"texts": "/data/texts", "base": "s3://bucket/base", "other": "/other"})
    bound = bind(site, recipe(), tmp_path / "recipes/recipe.yaml")
    assert bound.sources == site.sources | {"more/lines.jsonl": str(tmp_path / "recipes/more/lines.jsonl")}
    assert bound.locate("base") == "s3://bucket/base"
    assert [name for _, name in recipe_names(recipe())] == ["base", "base", "texts", "more/lines.jsonl"]


def test_a_name_of_the_site_wins_over_a_folder_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("base", "texts", "more/lines.jsonl"):
        write(tmp_path / name / "file", "")
    site = Site(sources={"texts": "/data/texts"})
    bound = bind(site, recipe(), tmp_path / "recipe.yaml")
    assert bound.locate("texts") == "/data/texts"
    assert bound.locate("base") == str(tmp_path / "base")


def test_names_that_lead_nowhere_are_all_listed(tmp_path: Path) -> None:
    lines = [
        "model: {path: base}",
        "data:",
        "  tokenizer: {path: base}",
        "  streams: [",
        "    {source: {path: texts}},",
        "    {source: {path: more/lines.jsonl}}]",
    ]
    path = write(tmp_path / "recipe.yaml", "\n".join(lines))
    with pytest.raises(SiteError) as caught:
        bind(Site(sources={"texts": "/data/texts", "books": "/data/books"}), recipe(), path)
    assert str(caught.value) == (
        f"{path}:1: model.path: no source 'base', and nothing at {tmp_path}/base; known: books, texts\n"
        f"{path}:3: data.tokenizer.path: no source 'base', and nothing at {tmp_path}/base; known: books, texts\n"
        f"{path}:6: data.streams[1].source.path: no source 'more/lines.jsonl', and nothing at {tmp_path}/more/lines.jsonl; "
        "known: books, texts\n"
        "  add them under sources: in site.yaml, each as name: /folder"
    )


def inventory(*disks: Disk) -> Inventory:
    gpu = Gpu(index=0, name="RTX PRO 6000", memory_bytes=96 * GIB, compute_capability="12.0")
    return Inventory(hostname="h", cores=16, memory_bytes=128 * GIB, gpus=(gpu,), disks=disks)


def disk(path: str, free: int, kind: DiskKind = "") -> Disk:
    return Disk(path=path, total_bytes=1000 * GIB, free_bytes=free * GIB, kind=kind)


@pytest.mark.parametrize(
    ("disks", "storage"),
    [
        ((disk("/home/me", 50), disk("/data: 'big' #1", 900)), "/data: 'big' #1/outgrow"),
        ((disk("/", 900), disk("/data", 50)), "HOME/.local/share/outgrow"),
        ((disk("/", 50), disk("/home", 50), disk("/data", 50)), "HOME/.local/share/outgrow"),
        ((), "HOME/.local/share/outgrow"),
    ],
)
def test_a_first_site_puts_data_on_the_disk_with_most_room(disks: tuple[Disk, ...], storage: str, tmp_path: Path) -> None:
    text = init_site(inventory(*disks), Path("/home/me"))
    assert text.startswith("# Where runs go on this machine: 16 cores, 128 GiB of memory, RTX PRO 6000.\n")
    site = load_site(write(tmp_path / "site.yaml", text))
    assert site.storage == storage.replace("HOME", str(tmp_path / "home"))
    assert site.model_copy(update={"storage": "", "cache": ""}) == load_site(None).model_copy(
        update={"storage": "", "cache": ""}
    )


def test_a_first_site_has_a_tier_for_each_disk_where_they_are_of_several_kinds(tmp_path: Path) -> None:
    disks = (
        disk("/", 50, "ssd"),
        disk("/mnt/big", 9000, "hdd"),
        disk("/nvme", 900, "ssd"),
        disk("/media/stick", 800, "usb"),
    )
    site = load_site(write(tmp_path / "site.yaml", init_site(inventory(*disks), Path("/home/me"))))
    assert site.storage == "/nvme/outgrow"
    assert [(tier.name, tier.path) for tier in site.tiers] == [
        ("ssd", "/nvme/outgrow"),
        ("hdd", "/mnt/big/outgrow"),
        ("usb", "/media/stick/outgrow"),
    ]
    assert site.place.checkpoints == ("hdd",)


def test_site_init_and_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outgrow.cli.site import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THE_KEY", "hunter2")
    users = tmp_path / "home/.config/outgrow/site.yaml"
    run = CliRunner()
    assert run.invoke(app, ["init"]).output == f"wrote {users}\n"
    again = run.invoke(app, ["init"])
    assert isinstance(again.exception, SiteError)
    assert str(again.exception).startswith(f"{users}: there is a site file already")
    users.write_text("storage_options: {secret: '${env:THE_KEY}'}")
    shown = run.invoke(app, ["show"]).output
    assert shown.startswith(f"# {users}\nschema: 1\n")
    assert "secret: '**********'" in shown
    assert "hunter2" not in shown
    users.write_text("tiers:\n- {name: nvme, path: /nvme}\n- {name: far, path: 'sftp://me:hunter2@host/x'}\n")
    shown = run.invoke(app, ["show"]).output
    assert "path: sftp://***@host/x" in shown
    assert "hunter2" not in shown
    assert run.invoke(app, ["init", "--force"]).exit_code == 0
    assert "THE_KEY" not in users.read_text()
    assert os.listdir(users.parent) == ["site.yaml"]
