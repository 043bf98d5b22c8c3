"""The files in deploy/ are what they say: read by Serve's and our own schema, without a key that either would overlook."""

import argparse
import pickle
import subprocess
import sys

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from sparsevila_cluster.app import build
from sparsevila_cluster.cli import serve_command as command
from sparsevila_cluster.cli.main import main
from sparsevila_cluster.cluster.workers.prefill_worker import PrefillWorker
from sparsevila_cluster.core.cluster_config import ClusterConfig, cluster_config_of, load_cluster_config
from sparsevila_cluster.core.errors import BadConfig
from tests.structure import ROOT

SERVE_FILE, CLUSTER_FILE = ROOT / "deploy" / "serve.yaml", ROOT / "deploy" / "cluster.yaml"
DEPLOYMENTS = {"Registry", "Prefill", "Decode", "Router"}


def unknown_keys(given, known, path=""):
    """Keys of `given` that `known`, the same after a schema has read it, lacks: Serve's schema ignores what it does not know."""
    if isinstance(given, dict) and isinstance(known, dict) and not path.endswith(".args"):
        for key, value in given.items():
            if key not in known:
                yield f"{path}.{key}"
            else:
                yield from unknown_keys(value, known[key], f"{path}.{key}")
    if isinstance(given, list):
        for i, (a, b) in enumerate(zip(given, known, strict=True)):
            yield from unknown_keys(a, b, f"{path}[{i}]")


def deployments_of(app):
    """{name: deployment} of an application and everything bound into it."""
    found, todo = {}, [app]
    while todo:
        bound = todo.pop()._bound_deployment
        found[bound.name] = bound
        todo += [argument for argument in bound.init_args if hasattr(argument, "_bound_deployment")]
    return found


def test_serve_takes_its_file():
    given = yaml.safe_load(SERVE_FILE.read_text())
    schema = ServeDeploySchema.model_validate(given)
    assert not list(unknown_keys(given, schema.model_dump()))
    (application,) = schema.applications
    assert application.import_path == "sparsevila_cluster.app:build"
    assert application.name == cluster_config_of(application.args).name
    assert {*deployments_of(build(application.args))} == DEPLOYMENTS


@pytest.mark.parametrize("where", [(), ("applications", 0)])
def test_a_misspelt_key_is_found(where):
    given = yaml.safe_load(SERVE_FILE.read_text())
    place = given
    for step in where:
        place = place[step]
    place["import_paht"] = "x"
    assert list(unknown_keys(given, ServeDeploySchema.model_validate(given).model_dump()))


def test_our_own_file_is_a_cluster_on_loopback():
    config = load_cluster_config(CLUSTER_FILE)
    assert config.door.host == config.transport.host == "127.0.0.1" and config.decode.replicas == 2
    assert config == cluster_config_of(yaml.safe_load(CLUSTER_FILE.read_text()))


def test_the_application_is_what_the_configuration_asks_for():
    fields = {
        "prefill": {"replicas": 3, "num_gpus": 1.0, "labels": {"pool": "prefill"}},
        "decode": {"replicas": 4, "num_cpus": 2.0, "resources": {"pool_decode": 0.5}},
        "health_period_s": 3.0,
        "drain_timeout_s": 7.0,
    }
    found = deployments_of(build(fields))
    assert {name: one.num_replicas for name, one in found.items()} == {"Registry": 1, "Prefill": 3, "Decode": 4, "Router": 1}
    prefill, decode = (found[name].ray_actor_options for name in ("Prefill", "Decode"))
    assert prefill["num_gpus"] == 1 and prefill["label_selector"] == {"pool": "prefill"}
    assert decode["num_cpus"] == 2 and decode["resources"] == {"pool_decode": 0.5}
    for one in found.values():
        config = one._deployment_config
        assert config.health_check_period_s == 3 and config.graceful_shutdown_timeout_s == 7
        assert config.request_router_config.request_router_class == "sparsevila_cluster.cluster.on_ray.replica_pinning:PinRouter"
        assert "RUN_ROUTER_IN_SEPARATE_LOOP" in str(one.ray_actor_options["runtime_env"])


def test_all_replicas_of_a_deployment_salt_alike_and_no_other_deployment_does():
    def secrets_of(fields):
        found = deployments_of(build(fields))
        (secret,) = {one.init_args[0].secret for one in found.values()}
        restarted = {pickle.loads(pickle.dumps(one.init_args[0])).secret for one in found.values()}
        assert restarted == {secret} and secret.decode() not in repr(found["Prefill"].init_args)
        return secret

    assert len({secrets_of({}) for _ in range(2)}) == 2 and len(secrets_of({})) == 64
    assert secrets_of({"content_secret": "x" * 32}) == b"x" * 32


def test_a_worker_has_the_secret_of_its_cluster_and_nobody_is_shown_it(tmp_path, capsys):
    with pytest.raises(BadConfig, match="content_secret"):
        PrefillWorker("p", cluster_config_of({}), model=object())
    with pytest.raises(BadConfig, match="content_secret: .*32") as refused:
        cluster_config_of({"content_secret": "too short"})
    assert "too short" not in str(refused.value)
    config = tmp_path / "cluster.yaml"
    config.write_text(f"content_secret: {'x' * 32}\nreport_s: 2\n")
    for options in ((), ("--json",)):
        assert main(["config", "check", str(config), *options]) == 0
        shown = capsys.readouterr().out
        assert "content_secret" in shown and "xx" not in shown


def test_build_takes_a_file_or_fields_not_both():
    assert {*deployments_of(build({"config": str(CLUSTER_FILE)}))} == DEPLOYMENTS
    with pytest.raises(BadConfig, match="besides it: name"):
        build({"config": str(CLUSTER_FILE), "name": "other"})
    for fields, told in (({"decode": {"replica": 2}}, "decode.replica"), ({"prefill": {"replicas": 0}}, "prefill.replicas")):
        with pytest.raises(BadConfig, match=told):
            build(fields)


@pytest.mark.parametrize(
    ("line", "place"),
    [([], ("127.0.0.1", 8600)), (["--port", "0"], ("127.0.0.1", 0)), (["--host", "::1", "--port", "9"], ("::1", 9))],
)
def test_options_override_the_file(line, place):
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    config = command._read_options(parser.parse_args(["--config", str(CLUSTER_FILE), *line]))
    assert (config.door.host, config.door.port) == place
    assert config.engine == load_cluster_config(CLUSTER_FILE).engine
    assert command._read_options(parser.parse_args([])) == ClusterConfig()


def test_a_router_and_the_directory_need_no_tensors():
    modules = "app cluster.routing.router cluster.directory cluster.on_ray.replicas gateway.grpc core.addresses"
    imports = "; ".join(f"import sparsevila_cluster.{module}" for module in modules.split())
    script = f"{imports}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120).returncode == 0
