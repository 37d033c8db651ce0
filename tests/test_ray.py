"""`fedkit simulate --engine ray`: Flower's simulation has the numbers of the other engines."""

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from flwr.app import Context, Error, Message, RecordDict
from inprocess import InProcessFederation, bits
from processes import fedkit
from test_flower_nodes import FlowersOwn

from fedkit.engine.plan import make_plan
from fedkit.errors import FedkitError, UsageError
from fedkit.flower import error_reply, new_context, take_identity
from fedkit.models.files import load_model
from fedkit.simulation import ray
from fedkit.simulation.settings import WorkerSettings

TINY = {"clients": 2, "rounds": 2, "models": "logistic,mlp:8", "local_epochs": 1}
KTPFL = TINY | {"strategy": "ktpfl", "public": "digits:64"}


@pytest.fixture(autouse=True)
def _identity():
    """As Flower gives to its processes, without which there are no messages."""
    take_identity()


class FlowersSimulation(FlowersOwn):
    """Stands for what Flower does on Ray: contexts with nothing but a number, one app for all."""

    def __init__(self, app, count):
        super().__init__({})
        self.apps = {
            node + 2: (app, new_context(node + 2, {"partition-id": node, "num-partitions": count}))
            for node in range(count)
        }


def planned(**settings):
    return make_plan(settings, local=True)


def simulated(monkeypatch, directory, tamper=None, **case):
    """The whole of ``simulate``, but for Ray itself."""

    def run_simulation(server_app, client_app, count, backend_config):
        grid = FlowersSimulation(client_app, count)
        grid.tamper = tamper
        with ThreadPoolExecutor(1) as pool:  # as Flower does, on another thread
            pool.submit(server_app, grid, Context(1, 1, {}, RecordDict(), {})).result()

    monkeypatch.setattr(ray, "run_simulation", run_simulation)
    monkeypatch.setattr(ray, "_is_installed", lambda: True)
    plan = planned(**case, device="cpu", run_dir=str(directory))
    return ray.simulate(plan, WorkerSettings(engine="ray"))


def test_the_numbers_are_those_of_the_other_engines_and_models_are_kept(tmp_path, monkeypatch):
    usual = InProcessFederation(**KTPFL)
    digest = usual.run()["digest"]
    result = simulated(monkeypatch, tmp_path / "run", **KTPFL)
    assert (result.summary["engine"], result.summary["digest"]) == ("ray", digest)
    assert not (tmp_path / "run" / "checkpoints").exists()
    for client in range(2):
        file = tmp_path / "run" / "clients" / f"client-{client}" / "ray" / "model.safetensors"
        own = bits(usual.context(client).state["own-model"])
        kept = {name: array.tobytes() for name, array in load_model(file).arrays.items()}
        assert kept == own


def test_the_first_client_that_fails_ends_the_run_with_its_name(tmp_path, monkeypatch):
    def broken(sent, reply):
        if sent.metadata.group_id == "1" and sent.metadata.dst_node_id == 3:
            return error_reply(sent, "Client 1 (mlp:8) failed: no memory\nTraceback ...")
        return reply

    with pytest.raises(FedkitError, match=r"^Client 1 \(mlp:8\) failed: no memory") as caught:
        simulated(monkeypatch, tmp_path / "run", broken, **KTPFL)
    assert str(caught.value) == "Client 1 (mlp:8) failed: no memory"
    assert caught.value.__notes__ == ["Traceback ..."]  # shown with --debug
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["stop_reason"]) == ("failed", str(caught.value))


def test_a_worker_that_died_is_an_error_with_the_client_s_name(tmp_path, monkeypatch):
    def lost(sent, reply):
        gone = sent.metadata.group_id == "1" and sent.metadata.dst_node_id == 2
        return Message(Error(0, "the actor died"), reply_to=sent) if gone else reply

    with pytest.raises(FedkitError, match=r"^Client 0 \(logistic\) failed: the actor died"):
        simulated(monkeypatch, tmp_path / "run", lost, **KTPFL)


def test_a_client_s_own_error_has_its_number(tmp_path):
    app = ray._SimulatedClients([{"model": "lenet"}, {"model": "cnn"}], "")
    context = new_context(3, {"partition-id": 1, "num-partitions": 2})
    reply = app(Message(RecordDict(), 3, "train", group_id="1"), context)
    sentence, _, trace = reply.error.reason.partition("\n")
    assert sentence.startswith("Client 1 (cnn) failed: The message comes from no fedkit")
    assert trace.startswith("Traceback")


@pytest.mark.parametrize("why", [RuntimeError("crashed"), KeyboardInterrupt()])
def test_when_ray_ends_first_the_server_ends_too_and_the_summary_says_so(
    tmp_path, monkeypatch, why
):
    begun = threading.Event()

    class Silent(FlowersSimulation):
        def pull_messages(self, message_ids):
            begun.set()
            return []

    def run_simulation(server_app, client_app, count, backend_config):
        grid = Silent(client_app, count)
        server = threading.Thread(
            target=server_app, args=(grid, Context(1, 1, {}, RecordDict(), {}))
        )
        server.start()
        assert begun.wait(60)
        raise why

    monkeypatch.setattr(ray, "run_simulation", run_simulation)
    monkeypatch.setattr(ray, "_is_installed", lambda: True)
    plan = planned(**KTPFL, run_dir=str(tmp_path / "run"))
    wanted = FedkitError if isinstance(why, RuntimeError) else KeyboardInterrupt
    with pytest.raises(wanted):
        ray.simulate(plan, WorkerSettings(engine="ray"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    if wanted is FedkitError:
        assert summary["stop_reason"] == "Ray's simulation ended: crashed."
    assert summary["status"] == ("failed" if wanted is FedkitError else "stopped")


def test_an_interrupt_ends_the_server_and_then_ray(tmp_path, monkeypatch):
    """Whose end would be that of the process, before the summary is written."""
    ended = []

    class Interrupted(FlowersSimulation):
        def pull_messages(self, message_ids):
            signal.raise_signal(signal.SIGINT)
            return []

    def run_simulation(server_app, client_app, count, backend_config):
        server_app(Interrupted(client_app, count), Context(1, 1, {}, RecordDict(), {}))
        ended.append("ray")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ray, "run_simulation", run_simulation)
    monkeypatch.setattr(ray, "_is_installed", lambda: True)
    plan = planned(**KTPFL, run_dir=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        ray.simulate(plan, WorkerSettings(engine="ray"))
    assert ended == ["ray"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("wrong", "told", "sentence"),
    [
        (ValueError("not even a thread"), ValueError, "^not even a thread"),
        (RuntimeError("no GCS"), FedkitError, r"^Ray's simulation ended: no GCS\."),
    ],
)
def test_a_run_that_never_began_raises_what_was_wrong(tmp_path, monkeypatch, wrong, told, sentence):
    def run_simulation(server_app, client_app, count, backend_config):
        raise wrong

    monkeypatch.setattr(ray, "run_simulation", run_simulation)
    monkeypatch.setattr(ray, "_is_installed", lambda: True)
    plan = planned(**KTPFL, run_dir=str(tmp_path / "run"))
    with pytest.raises(told, match=sentence):
        ray.simulate(plan, WorkerSettings(engine="ray"))


def test_without_ray_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "_is_installed", lambda: False)
    plan = planned(**KTPFL, run_dir=str(tmp_path / "run"))
    with pytest.raises(FedkitError, match=r"pip install 'fedkit\[ray\]'"):
        ray.simulate(plan, WorkerSettings(engine="ray"))
    assert not (tmp_path / "run").exists()


def test_devices_are_not_emulated_on_ray(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "_is_installed", lambda: True)
    plan = planned(**KTPFL, emulate="pi4", run_dir=str(tmp_path / "run"))
    with pytest.raises(UsageError, match="--emulate"):
        ray.simulate(plan, WorkerSettings(engine="ray"))


def test_clients_are_not_batched_on_ray(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "_is_installed", lambda: True)
    with pytest.raises(UsageError, match="--batched"):
        ray.simulate(planned(**KTPFL), WorkerSettings(engine="ray", batched=2))


def test_a_client_takes_its_threads_and_a_share_of_the_gpus(monkeypatch):
    monkeypatch.setattr(ray, "cores", lambda: 8)
    monkeypatch.setattr(ray, "_gpus", lambda plan: 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    plan = planned(**KTPFL | {"clients": 20, "threads": 2})
    given = ray._resources(plan, WorkerSettings(), 20)
    assert given["client_resources"] == {"num_cpus": 2, "num_gpus": 0.25}
    assert given["init_args"]["num_cpus"] == 8
    assert ray._resources(plan, WorkerSettings(workers=3), 20)["init_args"]["num_cpus"] == 6
    # Two of three share one, and nobody has more than one.
    for gpus, share in ((2, 0.5), (3, 1.0), (8, 1.0), (0, 0.0)):
        monkeypatch.setattr(ray, "_gpus", lambda plan, gpus=gpus: gpus)
        given = ray._resources(plan, WorkerSettings(workers=3), 20)
        assert given["client_resources"]["num_gpus"] == share
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "num_cpus" not in ray._resources(plan, WorkerSettings(), 20)["init_args"]


@pytest.mark.slow
@pytest.mark.skipif(not ray._is_installed(), reason="Ray is not installed")
def test_on_ray_itself_the_numbers_are_those_of_the_workers(tmp_path):
    options = ["--strategy", "ktpfl", "--models", "logistic,mlp:8", "--clients", "2"]
    options += ["--rounds", "2", "--public", "digits:64", "-o", "local-epochs=1"]
    for engine in ("processes", "ray"):
        done = fedkit(
            "simulate",
            *options,
            "--engine",
            engine,
            "--run-dir",
            engine,
            folder=tmp_path,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert "DEPRECATED" not in done.stderr
    digests = {
        json.loads((tmp_path / engine / "summary.json").read_text())["digest"]
        for engine in ("processes", "ray")
    }
    assert len(digests) == 1
