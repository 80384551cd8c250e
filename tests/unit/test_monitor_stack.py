"""What ``outgrow monitor up`` writes: configuration that the programs themselves accept, and no secret where others look."""

from __future__ import annotations

import configparser
import dataclasses
import json
import re
import stat
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from doctor import need
from monitor_sites import site_in, write_certificate, write_password

from outgrow.cli import monitor
from outgrow.errors import MonitorError, SiteError
from outgrow.monitoring.stack import access, alertmanager, compose, grafana, parts, prometheus
from outgrow.monitoring.stack.installed import Installed, PartName
from outgrow.monitoring.stack.part import Part, Setup
from outgrow.monitoring.stack.processes import Started
from outgrow.monitoring.stack.up import decide
from outgrow.recipes.schema.monitoring import Monitoring
from outgrow.recipes.schema.site import Site
from outgrow.recipes.site_loading import load_site

PASSWORD, WEBHOOK = "correct $horse battery", "https://chat.example/hook/very-secret"
PROGRAMS: dict[PartName, Installed] = {
    "prometheus": Installed(path=Path("/usr/bin/prometheus"), version="2.42.0+ds"),
    "alertmanager": Installed(path=Path("/usr/bin/prometheus-alertmanager"), version="0.25.0"),
    "grafana": Installed(path=Path("/usr/sbin/grafana-server"), version="11.6.0"),
}


def secured(folder: Path) -> dict[str, Any]:
    """Keys of a site with TLS, a password, and a webhook that is a secret."""
    certificate, key = write_certificate(folder)
    password = write_password(folder / "password", PASSWORD)
    own = {"certificate": str(certificate), "key": str(key), "user": "me", "password_file": str(password)}
    return {"access": own, "alert_webhook": WEBHOOK}


def written(site: Site, folder: Path, programs: dict[PartName, Installed] = PROGRAMS) -> dict[PartName, Part]:
    """The parts of a site, their files below ``folder``."""
    setup = dataclasses.replace(parts.prepare(site, folder), agent_url="http://127.0.0.1:9640")
    made = parts.make_parts(setup, programs)
    for part in made:
        parts.write_files(part, folder)
    return {part.name: part for part in made}


CASES = {
    "plain": {},
    "secured": {"secured": True},
    "receives": {"receive": True, "secured": True},
    "sends": {"remote_write": {"url": "https://home.example:9641/api/v1/write"}},
}


def case(name: str, tmp_path: Path) -> Site:
    keys = dict(CASES[name])
    more = secured(tmp_path) if keys.pop("secured", False) else {}
    if name == "sends":
        password = write_password(tmp_path / "home-password", PASSWORD)
        certificate, _ = write_certificate(tmp_path / "home")
        keys["remote_write"] |= {"user": "rented", "password_file": str(password), "certificate": str(certificate)}  # type: ignore[operator]
    return site_in(tmp_path, **keys, **more)


@pytest.mark.parametrize("name", CASES)
def test_prometheus_accepts_its_configuration(name: str, tmp_path: Path) -> None:
    need("promtool")
    folder = tmp_path / "stack"
    part = written(case(name, tmp_path), folder)["prometheus"]
    sends = ["--agent"] if name == "sends" else []
    check = ["promtool", "check", "config", *sends, folder / prometheus.CONFIG_FILE]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (name == "sends") == ("--enable-feature=agent" in part.command)
    if name in ("secured", "receives"):
        done = subprocess.run(["promtool", "check", "web-config", folder / "web.yml"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["plain", "secured"])
def test_alertmanager_accepts_its_configuration(name: str, tmp_path: Path) -> None:
    need("prometheus-alertmanager")
    written(case(name, tmp_path), tmp_path / "stack")
    done = subprocess.run(
        ["amtool", "check-config", tmp_path / "stack" / alertmanager.CONFIG_FILE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("1 receivers" in done.stdout) and "SUCCESS" in done.stdout


@pytest.mark.parametrize("name", CASES)
def test_nobody_else_reads_a_file_and_no_secret_is_in_a_command(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "stack"
    made = written(case(name, tmp_path), folder)
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    secrets = [PASSWORD, WEBHOOK, *(path.read_text() for path in (folder / "grafana").glob("[ps]*") if path.is_file())]
    if (folder / "web.yml").exists():
        secrets += [str(yaml.safe_load((folder / "web.yml").read_text())["basic_auth_users"]["me"])]
    for part in made.values():
        command = " ".join(part.command)
        assert not [secret for secret in secrets if secret in command]
        assert not [secret for secret in secrets if secret in repr(dataclasses.replace(part, files=()))]


def test_one_that_sends_on_keeps_no_rules_alerts_or_dashboards(tmp_path: Path) -> None:
    folder = tmp_path / "stack"
    made = written(case("sends", tmp_path), folder)
    assert set(made) == {"prometheus"}
    config = yaml.safe_load((folder / prometheus.CONFIG_FILE).read_text())
    assert "rule_files" not in config
    assert "alerting" not in config
    assert config["global"]["external_labels"]["origin"]
    assert config["remote_write"][0]["url"] == "https://home.example:9641/api/v1/write"
    assert not (folder / prometheus.RULES_FILE).exists()


def test_prometheus_3_is_an_agent_by_another_flag(tmp_path: Path) -> None:
    new = PROGRAMS | {"prometheus": Installed(path=Path("/opt/prometheus"), version="3.5.0")}
    command = written(case("sends", tmp_path), tmp_path / "stack", new)["prometheus"].command
    assert "--agent" in command
    assert "--enable-feature=agent" not in command


def test_everything_listens_on_loopback_alone_unless_the_site_says_otherwise(tmp_path: Path) -> None:
    for address, shown in (("127.0.0.1", "127.0.0.1"), ("10.0.0.5", "10.0.0.5"), ("0.0.0.0", "0.0.0.0"), ("::1", "[::1]")):
        site = site_in(tmp_path / shown.strip("[]").replace(":", "_"), address=address, open=True)
        made = written(site, tmp_path / "stack")
        own = site.monitoring
        assert f"--web.listen-address={shown}:{own.prometheus_port}" in made["prometheus"].command
        assert f"--web.listen-address={shown}:{own.alertmanager_port}" in made["alertmanager"].command
        assert "--cluster.listen-address=" in made["alertmanager"].command
        assert settings(tmp_path / "stack")["server"]["http_addr"] == address


def test_without_a_program_the_rest_knows(tmp_path: Path) -> None:
    site, folder = site_in(tmp_path), tmp_path / "stack"
    without = {name: one for name, one in PROGRAMS.items() if name != "alertmanager"}
    assert set(written(site, folder, without)) == {"prometheus", "grafana"}
    assert "alerting" not in yaml.safe_load((folder / prometheus.CONFIG_FILE).read_text())
    assert len(sources(folder)) == 1
    assert written(site, folder, {"grafana": PROGRAMS["grafana"]}) == {}


# --- Grafana ----------------------------------------------------------------------------------------------------------


def settings(folder: Path) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.read_string((folder / grafana.SETTINGS_FILE).read_text())
    return parsed


def sources(folder: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load((folder / grafana.PROVISIONING / "datasources/outgrow.yaml").read_text())["datasources"])


def test_grafana_lets_nobody_in_without_the_password_and_calls_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "stack"
    part = written(site_in(tmp_path), folder)["grafana"]
    found = settings(folder)
    assert found["security"]["admin_password"] == f"$__file{{{folder / 'grafana/password'}}}"
    assert len((folder / "grafana/password").read_text()) >= 24
    assert found["auth.anonymous"]["enabled"] == "false"
    assert found["users"]["allow_sign_up"] == "false"
    for key in ("reporting_enabled", "check_for_updates", "check_for_plugin_updates"):
        assert found["analytics"][key] == "false"
    assert part.command == ("/usr/sbin/grafana-server", f"--config={folder / grafana.SETTINGS_FILE}")
    for below in part.folders:
        assert (folder / below).is_dir()


def test_the_password_is_random_and_stays(tmp_path: Path) -> None:
    passwords = set()
    for name in ("one", "two"):
        for _ in range(2):
            written(site_in(tmp_path / name), tmp_path / name / "stack")
            passwords.add((tmp_path / name / "stack/grafana/password").read_text())
    assert len(passwords) == 2


def test_dashboards_find_the_data_source_that_is_provisioned(tmp_path: Path) -> None:
    folder = tmp_path / "stack"
    written(site_in(tmp_path), folder)
    first, second = sources(folder)
    assert (first["type"], first["uid"], first["isDefault"]) == ("prometheus", "outgrow-prometheus", True)
    assert (second["type"], second["jsonData"]["implementation"]) == ("alertmanager", "prometheus")
    provider = yaml.safe_load((folder / grafana.PROVISIONING / "dashboards/outgrow.yaml").read_text())["providers"][0]
    there = Path(provider["options"]["path"])
    names = {path.name for path in there.iterdir()}
    assert {"outgrow-run.json", "outgrow-goodput.json"} <= names
    assert settings(folder)["dashboards"]["default_home_dashboard_path"] == str(there / "outgrow-run.json")
    for path in there.iterdir():
        json.loads(path.read_text())


def test_the_dashboard_of_an_older_version_goes(tmp_path: Path) -> None:
    old = tmp_path / "stack" / grafana.DASHBOARDS / "outgrow-former.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    written(site_in(tmp_path), tmp_path / "stack")
    assert not old.exists()


def test_grafana_asks_through_tls_and_password(tmp_path: Path) -> None:
    folder = tmp_path / "stack"
    site = case("secured", tmp_path)
    written(site, folder)
    found = settings(folder)["server"]
    assert found["protocol"] == "https"
    assert found["cert_key"] == site.monitoring.access.key
    for source in sources(folder):
        assert source["url"].startswith("https://127.0.0.1:")
        assert source["jsonData"]["serverName"] == "home.example"
        assert source["basicAuthUser"] == "me"
        # Grafana puts variables of the environment in for a $ that stands alone.
        assert source["secureJsonData"]["basicAuthPassword"].replace("$$", "$") == PASSWORD
        assert "$$horse" in source["secureJsonData"]["basicAuthPassword"]
        assert "BEGIN CERTIFICATE" in source["secureJsonData"]["tlsCACert"]


def test_an_unpacked_grafana_is_told_where_it_lies(tmp_path: Path) -> None:
    home = tmp_path / "grafana-12.0.2"
    (home / "conf").mkdir(parents=True)
    (home / "conf/defaults.ini").touch()
    unpacked = PROGRAMS | {"grafana": Installed(path=home / "bin/grafana", version="12.0.2")}
    command = written(site_in(tmp_path), tmp_path / "stack", unpacked)["grafana"].command
    assert command[:3] == (str(home / "bin/grafana"), "server", f"--homepath={home}")


# --- what a change makes necessary ------------------------------------------------------------------------------------


def started(part: Part) -> Started:
    return Started(
        pid=1, pid_start=1, started=1, url="", version="", restart=part.digest("restart"), reload=part.digest("reload")
    )


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, {"prometheus": "keep", "alertmanager": "keep", "grafana": "keep"}),
        ({"keep_days": 7}, {"prometheus": "restart", "alertmanager": "keep", "grafana": "keep"}),
        ({"scrape_s": 30}, {"prometheus": "reload", "alertmanager": "keep", "grafana": "restart"}),
        ({"alert_webhook": WEBHOOK}, {"prometheus": "keep", "alertmanager": "reload", "grafana": "keep"}),
        ({"grafana_port": 9999}, {"prometheus": "keep", "alertmanager": "keep", "grafana": "restart"}),
        ({"receive": True}, {"prometheus": "restart", "alertmanager": "keep", "grafana": "keep"}),
        ({"idle_s": 5}, {"prometheus": "keep", "alertmanager": "keep", "grafana": "keep"}),
    ],
    ids=str,
)
def test_what_changes_is_restarted_and_nothing_else(change: dict[str, Any], wanted: dict[str, str], tmp_path: Path) -> None:
    site = site_in(tmp_path)
    before = written(site, tmp_path / "stack")
    after = written(site.model_copy(update={"monitoring": site.monitoring.model_copy(update=change)}), tmp_path / "stack")
    assert {name: decide(part, started(before[name]), alive=True) for name, part in after.items()} == wanted
    assert {decide(part, started(before[name]), alive=False) for name, part in after.items()} == {"start"}
    assert decide(after["prometheus"], None, alive=False) == "start"


def test_a_password_that_stays_changes_nothing_and_a_new_one_needs_no_restart(tmp_path: Path) -> None:
    site, folder = case("secured", tmp_path), tmp_path / "stack"
    before, web = written(site, folder), (folder / "web.yml").read_text()
    again = written(site, folder)
    assert (folder / "web.yml").read_text() == web
    assert again == before
    write_password(Path(site.monitoring.access.password_file), "another")
    after = written(site, folder)
    assert (folder / "web.yml").read_text() != web
    assert decide(after["prometheus"], started(before["prometheus"]), alive=True) == "keep"
    assert decide(after["grafana"], started(before["grafana"]), alive=True) == "restart"


# --- access -----------------------------------------------------------------------------------------------------------


def test_a_password_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = write_password(tmp_path / "password", "x")
    assert access.read_password(str(path), "key") == "x"
    path.chmod(0o640)
    with pytest.raises(SiteError, match=r"(?s)0640.*chmod 600"):
        access.read_password(str(path), "key")
    for wrong in ("", "a\nb", "x" * 73):
        write_password(path, wrong)
        with pytest.raises(SiteError, match="unusable"):
            access.read_password(str(path), "key")
    with pytest.raises(SiteError, match="monitoring.x: no password can be read"):
        access.read_password(str(tmp_path / "none"), "monitoring.x")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("home.example",), "home.example"),
        (("10.0.0.5", "home.example"), "home.example"),
        (("10.0.0.5",), "10.0.0.5"),
        (("*.home.example",), "any.home.example"),
    ],
)
@pytest.mark.parametrize("authority", [True, False])
def test_a_certificate_tells_its_name(names: tuple[str, ...], wanted: str, authority: bool, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path, names, authority=authority)
    site = site_in(tmp_path, access={"certificate": str(certificate), "key": str(key)})
    assert access.certificate_name(site.monitoring.access) == wanted


def test_a_certificate_of_no_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    def name(certificate: Path, key: Path) -> str:
        site = site_in(tmp_path, access={"certificate": str(certificate), "key": str(key)})
        return access.certificate_name(site.monitoring.access)

    good, other = write_certificate(tmp_path / "good"), write_certificate(tmp_path / "other")
    with pytest.raises(SiteError, match="make no connection"):
        name(good[0], other[1])
    with pytest.raises(SiteError, match="expired"):
        name(*write_certificate(tmp_path / "old", days=-1))
    with pytest.raises(SiteError, match="names no host"):
        name(*write_certificate(tmp_path / "nameless", ()))
    with pytest.raises(SiteError, match="make no connection"):
        name(tmp_path / "none.pem", good[1])


# --- Docker -----------------------------------------------------------------------------------------------------------


def test_containers_get_the_same_configuration(tmp_path: Path) -> None:
    site, folder = case("secured", tmp_path), tmp_path / "compose"
    assert compose.write(site, folder) == ["prometheus", "alertmanager", "grafana"]
    services = yaml.safe_load((folder / compose.FILE).read_text())["services"]
    for name, service in services.items():
        image, _, tag = service["image"].rpartition(":")
        assert image
        assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag), name
        assert service["network_mode"] == "host"
        assert "ports" not in service
    config = yaml.safe_load((folder / prometheus.CONFIG_FILE).read_text())
    assert config["rule_files"] == ["/etc/outgrow/prometheus/outgrow.rules.yml"]
    native = written(site, tmp_path / "stack")
    flags = [word.replace(str(tmp_path / "stack"), "/etc/outgrow") for word in native["prometheus"].command[1:]]
    assert services["prometheus"]["command"] == flags
    # Every path that a container is told of is one that it has.
    inside = {volume["target"] for service in services.values() for volume in service["volumes"]}
    texts = [*(folder.rglob("*.yml")), *(folder.rglob("*.yaml")), folder / grafana.SETTINGS_FILE]
    for path in texts:
        assert str(tmp_path) not in path.read_text() or path.name == compose.FILE, path
        for found in re.findall(r"/etc/outgrow[\w./-]*", path.read_text()):
            assert any(PurePosixPath(found).is_relative_to(one) for one in inside), found
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert PASSWORD not in (folder / compose.FILE).read_text()


def test_a_written_folder_is_written_again_and_no_other(tmp_path: Path) -> None:
    site, folder = site_in(tmp_path), tmp_path / "compose"
    compose.write(site, folder)
    password = (folder / grafana.PASSWORD_FILE).read_text()
    compose.write(site, folder)
    assert (folder / grafana.PASSWORD_FILE).read_text() == password
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    for place in ("mine", "mine/notes"):
        with pytest.raises(MonitorError, match="not an empty folder"):
            compose.write(site, tmp_path / place)


def test_no_two_parts_want_one_port(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="agent_port already"):
        site_in(tmp_path, prometheus_port=9640, agent_port=9640)


def test_the_sites_of_the_documentation_are_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALERT_WEBHOOK", WEBHOOK)
    page = (Path(__file__).parent.parent.parent / "docs/monitoring.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        path = tmp_path / f"site-{number}.yaml"
        path.write_text(f"schema: 1\n{block}")
        load_site(path)
    for key in re.findall(r"`monitoring\.(\w+)`", page):
        assert key in Monitoring.model_fields, key
    for command in re.findall(r"outgrow monitor (\w+)", page):
        assert command in {one.callback.__name__ for one in monitor.app.registered_commands if one.callback}, command


def test_a_setup_knows_no_secret_in_its_representation(tmp_path: Path) -> None:
    setup = Setup(
        monitoring=case("secured", tmp_path).monitoring, folder=PurePosixPath("/x"), agent_url="http://x", origin="here"
    )
    assert WEBHOOK not in repr(setup)
