"""An audit as numbers and as a page: all of it is there, and nothing of it is run or fetched."""

import base64
import copy
import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dlm_core import data
from dlm_core.beyond.layer_input import LayerInput
from dlm_core.harness import about, account, page
from dlm_core.harness.audit import audit
from dlm_core.harness.belief import Belief, Verdict
from dlm_core.results import Explains

IMAGES, LABELS, *_ = data.load("digits", n=3)
EVIL = "<script>alert('1 & 2')</script>"


class Named(nn.Module):
    """A network whose layer's name, which stands in the files, is code for a browser."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.add_module(EVIL, nn.Linear(64, 32))
            self.head = nn.Linear(32, 10)

    def forward(self, images):
        return self.head(self.get_submodule(EVIL)(images.flatten(1)).relu())


def snapshots(images, labels):
    model = Named()
    client = copy.deepcopy(model)
    run = torch.optim.SGD(client.parameters(), lr=0.1)
    F.cross_entropy(client(images), labels).backward()
    run.step()
    return model.state_dict(), client.state_dict()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / "before <b>.pt", folder / "after.pt"]
    for path, state in zip(paths, snapshots(IMAGES[:1], LABELS[:1])):
        torch.save(state, path)
    return audit(*paths, model=Named(), image_shape=(1, 8, 8), out=folder / "found.png")


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_the_json_has_all_that_the_audit_says(found, tmp_path):
    account.write(found, tmp_path / "found.json")
    told = json.loads((tmp_path / "found.json").read_text(), parse_constant=refuse)
    assert told == account.account(found) and told["schema"] == account.SCHEMA
    assert told["verdict"] == found.verdict and told["exit_status"] == found.verdict.exit_status
    assert [each["sentence"] for each in told["leaks"]] == [str(each) for each in found.leaks]
    assert [each["error"] for each in told["leaks"] if each["what"] != "label"] == [
        each.error for each in found.leaks if each.what != "label"
    ]
    assert [each["attack"] for each in told["tried"]] == found.tried
    assert [f"{each['what']}: {each['why']}" for each in told["untried"]] == [
        str(each) for each in found.untried
    ]
    assert told["first_look"]["sentences"] == list(found.look.sentences)
    assert told["notes"] == found.notes
    (tried,) = told["tried"]
    assert tried["explains"] == "fully" and tried["numbers"]["error"] == found["division"].error
    assert tried["labels"] == [None]  # division tells none
    assert told["asked"]["image_shape"] == [1, 8, 8] and told["asked"]["model"] == "Named"
    assert told["versions"]["torch"] == torch.__version__


def test_numbers_that_are_not_known_are_null(found):
    unknown = replace(found.look, learning_rate=float("nan"))
    told = account.account(replace(found, look=unknown))
    assert told["first_look"]["learning_rate"] is None


class Page(HTMLParser):
    """What a browser makes of it: tags, addresses and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.links, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.sources += [given[name] for name in ("src", "srcset", "data") if name in given]
        self.links += [given["href"]] if "href" in given else []
        assert not any(name.startswith("on") for name in given)

    def handle_data(self, text):
        self.text += text


def test_text_from_files_is_escaped_and_nothing_is_fetched(found):
    text = page.page(found)
    shown = Page(text)
    assert EVIL not in text and EVIL in shown.text and "before <b>.pt" in shown.text
    assert not {"script", "link", "iframe", "object", "b"} & {*shown.tags}
    assert shown.sources and all(
        each.startswith("data:image/png;base64,") for each in shown.sources
    )
    assert "url(" not in text and "@import" not in text


def test_the_page_shows_the_picture(found):
    (source,) = Page(page.page(found)).sources
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        pixels = np.asarray(picture, dtype=float) / 255
    side = len(pixels) // 8
    small = torch.from_numpy(pixels[::side, ::side].copy())
    assert (small - IMAGES[0, 0]).abs().max() < 0.01


def test_the_page_says_what_was_and_what_was_not_tried(found):
    text = " ".join(Page(page.page(found)).text.split())
    assert Verdict.LEAKED.sentence in text and found.verdict.sentence in text
    for part in (*found.leaks, *found.look.sentences, *(each.why for each in found.untried)):
        assert " ".join(str(part).split()) in text
    assert all(f"{letter} [1]" in text for letter in "ABCDEFGH")
    assert page.SOURCE in text and page.ADDRESS in Page(page.page(found)).links
    assert found.about.date in text and torch.__version__ in text
    assert re.search(r"SHA-256 of after.pt[0-9a-f]{64}", text)


@pytest.mark.parametrize("verdict", Verdict)
def test_no_verdict_comforts_in_words(verdict):
    assert "safe" not in verdict.sentence or "not make the client safe" in verdict.sentence


def test_what_is_not_explained_rules_nothing_out():
    said = {
        (grade, judged): page.ruled_out(Belief(grade, None, judged, 1.0))
        for grade, judged in itertools.product((Explains.LITTLE, Explains.PARTLY), (False, True))
    }
    assert all("othing is ruled out" in each for each in said.values())
    doubted = page.ruled_out(Belief(Explains.PARTLY, "two may have left it", True, 1.0))
    assert doubted == "Nothing is ruled out. It is not believed: two may have left it."


@pytest.mark.parametrize("shape", [(20, 1, 4, 4), (1, 3, 4, 4), (1, 5, 4, 4), (1, 1, 300, 300)])
def test_pictures_of_any_kind_are_shown(found, shape):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = replace(found["division"], images=images)
    shown = Page(page.page(replace(found, results={"division": result})))
    assert 1 <= len(shown.sources) <= page.MOST and "lie outside [0, 1]" in shown.text


def test_an_audit_of_no_files_and_of_equal_ones_has_its_page(tmp_path, capsys):
    state = Named().state_dict()
    where = {"model": Named(), "image_shape": (1, 8, 8), "out": tmp_path / "found.png"}
    found = audit(state, copy.deepcopy(state), **where)
    text = Page(page.page(found)).text
    assert "Nothing was sent" in text and "a OrderedDict" not in text and "no file" in text
    assert account.account(found)["files"]["before"]["sha256"] == {}
    assert Page(page.page(replace(found, about=None))).text.count("Not known.") == 1


def test_sharded_weights_have_a_digest_a_file(tmp_path):
    from safetensors.torch import save_file

    for n in (1, 2):
        save_file({f"w{n}": torch.zeros(n)}, tmp_path / f"{n}.safetensors")
    place = {f"w{n}": f"{n}.safetensors" for n in (1, 2)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": place}))
    for given in (tmp_path, index):
        digests = about.snapshot(given).digests
        assert list(digests) == [index.name, "1.safetensors", "2.safetensors"]
        assert len(set(digests.values())) == 3


def test_the_page_of_a_client_whose_images_are_in_doubt_says_so(tmp_path):
    files = snapshots(IMAGES[:2], LABELS[:1].repeat(2))
    where = {"model": Named(), "image_shape": (1, 8, 8), "out": tmp_path / "found.png"}
    found = audit(*files, attack="dlm_plus", **where)
    assert found.verdict != "leaked" and isinstance(found.look.layers[0], LayerInput)
    assert "Ruled out: that the files keep" not in page.page(found)
