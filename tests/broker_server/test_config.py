from pathlib import Path

import pytest

from broker_server.config import Codec, Federation, Stop, load
from edge_client.errors import ConfigError

LEAST = '[federation]\nname = "demo"\nbundle = "model.fedge"\n'


@pytest.fixture
def write(tmp_path):
    def write_it(text: str) -> Path:
        path = tmp_path / "federation.toml"
        path.write_text(text)
        return path

    return write_it


def test_the_least_file_and_its_defaults(write, tmp_path):
    found = load(write(LEAST))
    assert found.federation.bundle == str(tmp_path / "model.fedge")
    assert found.federation.state == str(tmp_path / "state")
    assert (found.round.invited, found.round.quorum) == (10, 10)
    assert found.evaluation.data == ""
    assert found.train.hypers == {}


BUFFERED = """
[federation]
name = "demo"
bundle = "cnn.fedge"
[round]
mode = "buffered"
concurrency = 30
buffer = 6
staleness = 0.25
max_staleness = 9
[personal]
layers = ["head.*"]
head_epochs = 4
"""


def test_every_key_is_read(write, tmp_path):
    text = """
[federation]
name = "Demo_1-a"
bundle = "/models/cnn.fedge"
state = "run/1"
seed = 7
[broker]
url = "mqtts://broker.example:8883"
kind = "mosquitto"
host = "localhost"
port = 1883
username = "server"
password_file = "secret"
tls_ca = "ca.crt"
tls_certificate = "server.crt"
tls_key = "server.key"
[round]
cohort = 7
over_select = 1.5
deadline = 60
minimum = 6
clients = 20
[train]
epochs = 2
steps = 5
seconds = 20
batch_size = 16
schedule = "linear"
validation = 0.2
patience = 3
[train.decay]
kind = "exponential"
every = 20
[train.hypers]
lr = 0.05
mu = 1
[personal]
method = "ditto"
lambda = 0.5
epochs = 3
steps = 9
[personal.hypers]
lr = 0.01
[aggregation]
algorithm = "multi-krum"
weights = "uniform"
norm = 3.5
[aggregation.options]
attackers = 0.3
keep = 4
[aggregation.clients]
"pi-*" = 2
[server]
optimizer = "yogi"
learning_rate = 0.5
[server.options]
beta2 = 0.9
[server.schedule]
kind = "cosine"
warmup = 2
factor = 0.25
every = 7
rounds = 40
least = 0.1
[codec]
kind = "none"
target = "bits"
value = 0.3
feedback = "none"
upload_seconds = 30
model_step = 20
model_noise = 0.1
[codec.clients]
"pi-*" = 0.05
[evaluation]
every = 5
clients = 30
data = "test.npz"
batch_size = 512
deadline = 30
confusion = true
period = 3600
[analytics]
labels = true
features = 20
range = [-3, 3]
least = 15
[stop]
rounds = 50
metric = "loss"
target = 0.25
patience = 4
seconds = 3600
bytes = 1000000000
[transfer]
chunk = 1024
window = 4
uploads = 8
inline = 0
spread = 5
[trust]
authority = "authority"
offer_days = 2
approve = ["pi-*", "lab-?"]
certificate_days = 90
[limits]
norm = 5
samples = 500
messages = 10
bytes = 1e5
strikes = 3
mute_seconds = 10
turn = 5
[simulation]
clients = 30
data = "my_data:readings"
split = "natural"
alpha = 1
shards = 3
key = "writer"
label = "digit"
test_fraction = 0.1
holdout = 0.2
share = "labels,features"
slots = 2
availability = 0.5
dropout = 0.1
speed = [0.25, 1]
bandwidth = 1e6
latency = 0.05
identities = "phones"
"""
    found = load(write(text))
    assert found.federation.bundle == "/models/cnn.fedge"
    assert found.broker.password_file == str(tmp_path / "secret")
    assert found.broker.tls_key == str(tmp_path / "server.key")
    assert found.simulation.identities == str(tmp_path / "phones")
    assert (found.round.invited, found.round.quorum) == (11, 20)
    assert found.train.hypers == {"lr": 0.05, "mu": 1.0}
    assert found.evaluation.data == str(tmp_path / "test.npz")
    assert found.simulation.data == "my_data:readings"
    assert found.simulation.speed == (0.25, 1.0)
    more = load(write(BUFFERED))
    # Nothing in the files equals its default: were a key ignored, its section would still show the default.
    for section, default in ((s, getattr(load(write(LEAST)), s)) for s in Federation.__struct_fields__):
        for name in default.__struct_fields__:
            values = [getattr(getattr(one, section), name) for one in (found, more)]
            assert any(value != getattr(default, name) for value in values), f"{section}.{name}"


def test_overrides_are_checked_like_the_file(write):
    path = write(LEAST)
    found = load(path, {"stop.rounds": 3, "simulation.clients": 5, "round.cohort": 2})
    assert (found.stop.rounds, found.simulation.clients, found.round.cohort) == (3, 5, 2)
    with pytest.raises(ConfigError, match=r"stop\.rounds is -1; expected a whole number from 0"):
        load(path, {"stop.rounds": -1})


BAD = {
    "buffered without saying so": (
        "[round]\nbuffer = 5",
        r'round\.buffer is 5 and means nothing with round\.mode = "synchronous"; '
        r'remove it, or set round\.mode = "buffered"',
    ),
    "of rounds, and there are none": (
        '[round]\nmode = "buffered"\nminimum = 2',
        r'round\.minimum is 2 and means nothing with round\.mode = "buffered"; remove it, or',
    ),
    "no such mode": (
        '[round]\nmode = "async"',
        r'round\.mode is \'async\'; expected one of "buffered", "evaluation", "synchronous"',
    ),
    "growing with age": ('[round]\nmode = "buffered"\nstaleness = -1', r"round\.staleness is -1; .* from 0 to 100"),
    "more that evaluate than phones": (
        '[round]\nmode = "evaluation"\n[evaluation]\nclients = 9\n[simulation]\nclients = 5\ndata = "d.npz"',
        r"evaluation\.clients is 9; expected at most simulation\.clients, 5, or round\.clients, how many to wait for",
    ),
    "more at once than phones": (
        '[round]\nmode = "buffered"\nconcurrency = 9\n[simulation]\nclients = 5\ndata = "d.npz"',
        r"round\.concurrency is 9; expected at most simulation\.clients, 5: there are no more phones to ask",
    ),
    "typo": (
        "[round]\ncohrt = 3",
        r"round\.cohrt is not a known key; did you mean round\.cohort\? known here: mode, cohort, ",
    ),
    "unknown section": (
        "[rounds]\ncohort = 3",
        r"rounds is not a known key; did you mean round\? known here: federation, ",
    ),
    "far off": ("[codec]\nzzz = 1", r"codec\.zzz is not a known key; known here: kind, target, "),
    "type": ('[round]\ncohort = "ten"', r"round\.cohort is 'ten'; expected a whole number from 1 to 10,000,000"),
    "bool for number": ("[round]\ncohort = true", r"round\.cohort is True; expected a whole number"),
    "number for bool": ("[codec]\nfeedback = 1", r'codec\.feedback is 1; expected one of "length", "none", "residual"'),
    "too low": ("[round]\nover_select = 0.9", r"round\.over_select is 0\.9; expected a number from 1 to 10"),
    "too high": ("[transfer]\nchunk = 2000000", r"transfer\.chunk is 2000000; .* from 1,024 to 1,048,576"),
    "open bound": (
        "[server]\noptions = { momentum = 1.0 }",
        r"server\.options\.momentum is 1\.0; expected a number from 0 to below 1",
    ),
    "above": (
        "[server]\nlearning_rate = 0",
        r"server\.learning_rate is 0; expected a number above 0 to 1,000",
    ),
    "no such algorithm": (
        '[aggregation]\nalgorithm = "fedagv"',
        r'aggregation\.algorithm is "fedagv"; expected one of "fedavg", "fednova", .*"geometric-median", or module',
    ),
    "no such module": (
        '[aggregation]\nalgorithm = "no_such_module:RULE"',
        r'aggregation\.algorithm is "no_such_module:RULE": ModuleNotFoundError: .*; expected one of "fedavg", ',
    ),
    "something else of a module": (
        '[server]\noptimizer = "broker_server.ledger:BEST"',
        r'server\.optimizer is "broker_server\.ledger:BEST", which is a str; expected a Optimizer',
    ),
    "no such optimizer": (
        '[server]\noptimizer = "lamb"',
        r'server\.optimizer is "lamb"; expected one of "sgd", "adam", "yogi", "adagrad", or module:attribute',
    ),
    "of another algorithm": (
        '[aggregation]\nalgorithm = "median"\noptions = { trim = 0.1 }\n[codec]\nkind = "none"',
        r"aggregation\.options\.trim is not a known key; known here: $",
    ),
    "all trimmed": (
        '[aggregation]\nalgorithm = "trimmed-mean"\noptions = { trim = 0.5 }\n[codec]\nkind = "none"',
        r"aggregation\.options\.trim is 0\.5; expected a number from 0 to below 0\.5",
    ),
    "median without rounds": (
        '[round]\nmode = "buffered"\n[aggregation]\nalgorithm = "median"\n[codec]\nkind = "none"',
        r'algorithm = "median" cannot be combined with round\.mode = "buffered": its updates are of one version; '
        r'expected "fedavg" or "fednova", or synchronous rounds',
    ),
    "median of what is mostly left out": (
        '[aggregation]\nalgorithm = "median"',
        r'algorithm = "median" cannot be combined with codec\.target = "nmse" at 0\.1, which leaves most elements out: '
        r'.*expected codec\.kind = "none", or codec\.target = "nmse" with a value up to 0\.01 or .*; or "fedavg" or ',
    ),
    "median where one client is coarse": (
        '[aggregation]\nalgorithm = "median"\n[codec]\nvalue = 0.01\nclients = { "pi-*" = 0.2 }',
        r'algorithm = "median" cannot be combined with codec\.target = "nmse" at 0\.2',
    ),
    "median where slow clients are coarse": (
        '[aggregation]\nalgorithm = "median"\n[codec]\nvalue = 0.01\nupload_seconds = 5',
        r'algorithm = "median" cannot be combined with codec\.upload_seconds',
    ),
    "median of so many bits": (
        '[aggregation]\nalgorithm = "median"\n[codec]\ntarget = "bits"\nvalue = 1',
        r'algorithm = "median" cannot be combined with codec\.target = "bits" at 1',
    ),
    "noise of what is no mean": (
        '[aggregation]\nalgorithm = "fednova"\n[codec]\ntarget = "cohort"',
        r'algorithm = "fednova" cannot be combined with codec\.target = "cohort", .*expected "fedavg", or ',
    ),
    "noise by weights of one's own": (
        '[aggregation.clients]\n"pi-*" = 2\n[codec]\ntarget = "cohort"',
        r'aggregation\.clients cannot be combined with codec\.target = "cohort"',
    ),
    "too few for krum": (
        '[aggregation]\nalgorithm = "krum"\noptions = { attackers = 0.4 }\n[round]\ncohort = 20\nminimum = 10',
        r'round\.minimum is 10; expected at least 11, which aggregation\.algorithm = "krum" needs',
    ),
    "scaffold of nobody knows how many": (
        '[aggregation]\nalgorithm = "scaffold"',
        r"aggregation\.options\.clients is missing; expected how many clients there are in all, at least "
        r'round\.cohort, 10, for aggregation\.algorithm = "scaffold"',
    ),
    "scaffold of fewer than a cohort": (
        '[aggregation]\nalgorithm = "scaffold"\noptions = { clients = 9 }',
        r"aggregation\.options\.clients is 9; expected .* at least round\.cohort, 10",
    ),
    "feddyn of fewer phones than a cohort": (
        '[aggregation]\nalgorithm = "feddyn"\n[simulation]\nclients = 8',
        r"aggregation\.options\.clients is missing; expected",
    ),
    "scaffold without rounds": (
        '[aggregation]\nalgorithm = "scaffold"\noptions = { clients = 50 }\n[round]\nmode = "buffered"',
        r'algorithm = "scaffold" cannot be combined with round\.mode = "buffered"',
    ),
    "feddyn of shortened updates": (
        '[aggregation]\nalgorithm = "feddyn"\noptions = { clients = 50 }\nnorm = 1.0',
        r'algorithm = "feddyn" cannot be combined with aggregation\.norm: .*limits\.norm',
    ),
    "scaffold of updates that lose": (
        '[aggregation]\nalgorithm = "scaffold"\noptions = { clients = 50 }\n[codec]\nfeedback = "length"',
        r'algorithm = "scaffold" cannot be combined with codec\.feedback = "length": .*expected "residual", or codec',
    ),
    "feddyn with two strengths": (
        '[aggregation]\nalgorithm = "feddyn"\noptions = { clients = 50, alpha = 0.2 }\n[train.hypers]\nmu = 0.1',
        r'train\.hypers\.mu is 0\.1; aggregation\.algorithm = "feddyn" sets it to 0\.2: remove it',
    ),
    "feddyn with none": (
        '[aggregation]\nalgorithm = "feddyn"\noptions = { clients = 50, alpha = 0 }',
        r"aggregation\.options\.alpha is 0; expected a number above 0",
    ),
    "falls for ever": (
        '[server.schedule]\nkind = "linear"\n[stop]\nrounds = 0',
        r'server\.schedule\.rounds is 0 and so is stop\.rounds; expected one of them with kind = "linear"',
    ),
    "validation alone": (
        "[train]\nvalidation = 0.2",
        r"train\.validation is set without train\.patience; expected both, as validation = 0\.2 and patience = 3, or",
    ),
    "patience alone": ("[train]\npatience = 2", r"train\.patience is set without train\.validation; expected both"),
    "all aside": ("[train]\nvalidation = 1.0", r"train\.validation is 1\.0; expected a number from 0 to below 1"),
    "no time to answer": (
        "[train]\nseconds = 60\n[round]\ndeadline = 60",
        r"train\.seconds is 60; expected less than round\.deadline, 60, which also holds the transfers",
    ),
    "no such schedule": (
        '[train]\nschedule = "step"',
        r"train\.schedule is 'step'; expected one of \"constant\", \"cosine\", \"linear\"",
    ),
    "decay of what": (
        '[train.decay]\nkind = "step"',
        r"train\.decay is set without train\.hypers\.lr; expected the learning rate that it falls from",
    ),
    "decays for ever": (
        '[train]\nhypers = { lr = 0.1 }\ndecay = { kind = "cosine" }\n[stop]\nrounds = 0',
        r'train\.decay\.rounds is 0 and so is stop\.rounds; expected one of them with kind = "cosine"',
    ),
    "decays to nothing": (
        '[train]\nhypers = { lr = 0.1 }\ndecay = { kind = "linear", rounds = 50 }\n[stop]\nrounds = 51',
        r"train\.decay\.least is 0 and train\.decay\.rounds 50: nothing would be learned in later rounds; ex",
    ),
    "choice": ('[codec]\nkind = "zip"', r'codec\.kind is \'zip\'; expected one of "none", "quantized"'),
    "hyper": ('[train.hypers]\nlr = "x"', r"train\.hypers\.lr is 'x'; expected a number"),
    "hyper name": ('[train.hypers]\n"l r" = 1.0', r"name in train\.hypers is 'l r'; expected a text that matches"),
    "hypers not a section": (
        "[train]\nhypers = 3",
        r"train\.hypers is 3; expected a section of names, each with a number",
    ),
    "section not a section": ("stop = 3", r"stop is 3; expected a section, \[stop\]"),
    "nan": ("[stop]\ntarget = nan", r"stop\.target is nan; expected a number"),
    "infinite": ("[stop]\ntarget = -inf", r"stop\.target is -inf; expected a number"),
    "pair": (
        "[simulation]\nspeed = [1.0]",
        r"simulation\.speed is \[1\.0\]; expected a list of 2, each a number above 0",
    ),
    "pair reversed": (
        "[simulation]\nspeed = [2.0, 1.0]",
        r"simulation\.speed is \[2\.0, 1\.0\]; expected \[slowest, fastest",
    ),
    "rule": (
        '[trust]\napprove = "all"',
        r"trust\.approve is 'all'; expected .*one of \"ask\", \"claim\"",
    ),
    "pattern": (
        '[trust]\napprove = ["pi-*", "a b"]',
        r"trust\.approve is \['pi-\*', 'a b'\]; expected .*a list, each a text that matches",
    ),
    "url": ('[broker]\nurl = "http://x"', r"broker\.url is 'http://x'; expected a text that matches"),
    "minimum": ("[round]\nminimum = 11", r"round\.minimum is 11; expected at most round\.cohort, 10"),
    "quorum": ("[round]\nminimum = 5\nclients = 4", r"round\.clients is 4; expected at least round\.minimum, 5"),
    "password alone": ('[broker]\npassword_file = "x"', r"broker\.password_file is set without broker\.username"),
    "rate": (
        '[codec]\ntarget = "nmse"\nvalue = 2',
        r'codec\.value is 2\.0; expected at most 0\.999 with codec\.target = "nmse"',
    ),
    "rate of a client": (
        '[codec]\ntarget = "bits"\nvalue = 1\n[codec.clients]\n"pi-*" = 33',
        r'codec\.clients\.pi-\* is 33\.0; expected at most 32 with codec\.target = "bits"',
    ),
    "rate that has no default": (
        '[codec]\ntarget = "bits"',
        r'codec\.value is missing; expected a number of bits with codec\.target = "bits"',
    ),
    "coarse cohort": (
        '[codec]\ntarget = "cohort"\nvalue = 1001',
        r'codec\.value is 1001\.0; expected at most 1000 with codec\.target = "cohort"',
    ),
    "rate of nothing": ("[codec]\nvalue = 0", r"codec\.value is 0; expected a number above 0"),
    "client name": ('[codec.clients]\n"a/b" = 1', r"name in codec\.clients is 'a/b'; expected a text that matches"),
    "too few phones": ('[simulation]\ndata = "x.npz"\nclients = 9', r"round\.cohort is 10; .* simulation\.clients, 9"),
    "nothing to measure": ("[stop]\ntarget = 0.9", r"need an evaluation and there is none; set evaluation\.data or"),
    "nobody to measure": (
        '[evaluation]\ndata = "test.npz"\n[stop]\nmetric = "client_accuracy_worst"\ntarget = 0.9',
        r"stop\.metric is 'client_accuracy_worst', which clients measure.*set evaluation\.clients",
    ),
    "nobody to count": (
        "[evaluation]\nconfusion = true",
        r"evaluation\.confusion is asked of evaluation\.clients, 0; expected at least 10 clients.*analytics\.least",
    ),
    "too few to count": (
        "[evaluation]\nclients = 20\n[analytics]\nlabels = true\nleast = 21",
        r"analytics\.labels is asked of evaluation\.clients, 20; expected at least 21 clients",
    ),
    "never counted": (
        "[evaluation]\nclients = 20\nevery = 0\n[analytics]\nfeatures = 8",
        r"analytics\.features is asked for and evaluation\.every is 0",
    ),
    "empty range": ("[analytics]\nrange = [1, 1]", r"analytics\.range is \[1\.0, 1\.0\]; expected \[lowest, highest\]"),
    "nothing to share": (
        '[simulation]\nshare = "faces"',
        r"simulation\.share is 'faces'; expected labels, features, both with a comma, or nothing",
    ),
    "nobody evaluates": (
        '[round]\nmode = "evaluation"',
        r"nobody evaluates; set evaluation\.clients or evaluation\.data",
    ),
    "not TOML": ("[round\n", r"is not TOML: .*line 4"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_named(write, text, message):
    top, rest = (text + "\n", "") if text.startswith("stop") else ("", text)
    path = write(top + LEAST + rest)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"federation\.name is missing; expected a text that matches"),
        ('[federation]\nname = "a"', r"federation\.bundle is missing; expected a text"),
        ('[federation]\nname = "a/b"\nbundle = "x"', r"federation\.name is 'a/b'; expected a text"),
        ('[federation]\nname = "a\\n"\nbundle = "x"', r"federation\.name is 'a\\n'; expected a text"),
        ('[federation]\nname = "a"\nbundle = ""', r"federation\.bundle is empty; expected a path"),
    ],
)
def test_what_every_federation_needs(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load(write(text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file or directory\)"):
        load(tmp_path / "none.toml")


def test_targets_with_a_default_have_their_own_and_clients_may_have_others():
    assert Codec().rate("a") == 0.1
    assert Codec(target="cohort").rate("a") == 2.0
    codec = Codec(target="cohort", value=3.0, clients={"pi-*": 5.0})
    assert (codec.rate("a"), codec.rate("pi-1")) == (3.0, 5.0)


@pytest.mark.parametrize(
    "text",
    [
        "[train]\nseconds = 60\n[round]\nmode = 'buffered'\ndeadline = 60",
        "[train]\nhypers = { lr = 0.1 }\ndecay = { kind = 'linear', rounds = 50 }\n[stop]\nrounds = 50",
        "[train]\nhypers = { lr = 0.1 }\ndecay = { kind = 'linear', rounds = 50, least = 0.1 }\n[stop]\nrounds = 0",
        "[train]\nhypers = { lr = 0.1 }\ndecay = { kind = 'cosine' }",
    ],
)
def test_what_can_be_together(write, text):
    load(write(LEAST + text))


def test_which_value_is_better():
    accuracy, loss = Stop(target=0.9), Stop(metric="squared_error", target=0.1)
    assert accuracy.better(0.6, 0.5)
    assert not accuracy.better(0.5, 0.5)
    assert loss.better(0.4, 0.5)
    assert loss.better(0.5, None)
    assert not loss.better(float("nan"), None)
    assert accuracy.reached(0.9)
    assert not accuracy.reached(0.89)
    assert loss.reached(0.1)
    assert not Stop().reached(1.0)
