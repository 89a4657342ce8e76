"""The atlas in Chromium and in Firefox, from the disk."""

import csv
import json

import numpy as np
import pytest
from browsers import missing, started

from src.errors import printable
from src.reports.atlas import AtlasData, Clusters, write

NAMES = ['say "cheese".png', "<b onclick=alert(1)>bold</b>.png", "two\nlines.png", "cat 🐈.png", "back\\slash.png"]
COUNT, MODEL = 60, "a1" * 32


def picture(i: int) -> np.ndarray:
    """Three kinds of stripes. Image 5 is broken, 6 dark, 7 bright, 8 blurred, 9 tiny, and 11 is almost 10."""
    kind = 10 if i == 11 else i
    rng = np.random.default_rng(kind)
    if i == 5:
        raise OSError("truncated file")
    if i == 9:
        return rng.integers(60, 190, (6, 6, 3), dtype=np.uint8)
    if i in (6, 7, 8):
        return np.full((48, 60, 3), {6: 10, 7: 250, 8: 120}[i], dtype=np.uint8)
    image = rng.integers(0, 120, (48, 60, 3), dtype=np.uint8)
    image[:, :, kind % 3] += 100
    return image + np.uint8(i == 11)


def clusters(name: str, classifier: int, seed: int) -> Clusters:
    rng = np.random.default_rng(seed)
    scores = rng.random((COUNT, 4)) + 3 * np.eye(4)[np.arange(COUNT) % 3]
    shares = scores / scores.sum(axis=1, keepdims=True)
    order = np.argsort(-shares, axis=1)
    top = order, np.take_along_axis(shares, order, axis=1)
    return Clusters(
        name=name, clusters=order[:, 0], confidences=top[1][:, 0], size=4, model=MODEL, classifier=classifier, top=top
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    paths = [f"pictures/{name}" for name in NAMES] + [f"pictures/{i:03}.png" for i in range(len(NAMES), COUNT)]
    embeddings = 4 * np.eye(3)[np.arange(COUNT) % 3] + np.random.default_rng(0).normal(size=(COUNT, 3))
    data = AtlasData(
        title="<i>stripes</i>",
        paths=[printable(path, reversible=True) for path in paths],
        picture=picture,
        embeddings=embeddings,
        clusterings=[clusters("classifier 2", 2, 0), clusters("other/run", 0, 1)],
        files=[str(folder / path) for path in paths],
        labels=np.arange(COUNT) % 3,
        classes=["red", "green", "blue"],
        skipped=[("pictures/<u>.txt", "not an image")],
        history=[{"epoch": k, "loss": 1 / k} for k in range(1, 6)],
        config={"method": "self_classifier"},
        notes=[("unsure", "There is only one run.")],
    )
    write(data, folder / "atlas.html")
    return (folder / "atlas.html").as_uri()


@pytest.fixture(scope="module", params=["chromium", pytest.param("firefox", marks=pytest.mark.slow)])
def browser(request, page, tmp_path_factory):
    if reason := missing(request.param):
        pytest.skip(reason)
    with started(request.param, tmp_path_factory.mktemp("browser")) as browser:
        browser.open(page)
        yield browser


@pytest.fixture
def atlas(browser):
    """The first page of the atlas, without changes. After the test, the console must be empty, and nothing may be loaded."""
    browser.run(
        "(document.querySelector('dialog[open]')?.close(), undoAll(), localStorage.clear(), location.hash = '#clustering=0')"
    )
    browser.wait("state.address === '#clustering=0' && document.querySelector('.tile')")
    yield browser
    browser.run("1")  # so that pending reports arrive
    assert browser.problems == []
    loaded = [url for url in browser.requests if not url.startswith(("data:", "blob:"))]
    assert {url.rsplit("/", 1)[1].split("#")[0] for url in loaded} <= {"atlas.html"}


def texts(selector: str) -> str:
    return f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)"


def test_the_overview_shows_four_kinds_of_images_of_each_cluster(atlas):
    assert atlas.run("document.title") == "<i>stripes</i> – atlas"
    assert atlas.run(texts(".tile h3")) == ["cluster 0", "cluster 1", "cluster 2"]
    atlas.wait("document.querySelectorAll('.strip').length === 12")
    assert atlas.run(texts(".tile:first-child .strip-name")) == ["surest", "most typical", "most diverse", "least sure"]
    sure = atlas.run(
        "[...document.querySelectorAll('.tile:first-child .strip:first-child .cell')].map((c) => c.dataset.image)"
    )
    found = clusters("", 2, 0)
    members = np.flatnonzero(found.clusters == 0)
    assert [int(i) for i in sure] == members[np.argsort(-found.confidences[members])][:6].tolist()
    assert "purity100 %red" in atlas.run("document.querySelector('.tile .meters').textContent")


def test_names_are_shown_as_text(atlas):
    for i, name in enumerate(NAMES):
        atlas.run(f"openImage({i})")
        assert atlas.run("document.querySelector('dialog .path').textContent") == printable(name, reversible=True)
    assert atlas.run("document.querySelectorAll('b').length") == 0
    assert atlas.run("byId('title').textContent") == "<i>stripes</i>"


def test_thumbnails_have_the_colours_of_their_images(atlas):
    def mean(i: int) -> list[float]:
        code = f"""(async () => {{
            await loadSheet(locate({i}).sheet);
            const canvas = new OffscreenCanvas(60, 60);
            const context = canvas.getContext("2d");
            drawThumbnail(context, {i}, 0, 0, 60);
            const pixels = context.getImageData(6, 6, 48, 48).data;
            return [0, 1, 2].map((c) => pixels.filter((_, k) => k % 4 === c).reduce((a, b) => a + b, 0) / 2304);
        }})()"""
        return atlas.run(code)

    for i in (0, 13, 29, 59):
        expected = picture(i)[:, 6:54].mean(axis=(0, 1))
        assert np.abs(np.array(mean(i)) - expected).max() < 12  # edges are cut and the file is compressed


def test_an_address_opens_its_place(atlas, page):
    atlas.open(f"{page}#cluster=1")
    atlas.wait("document.querySelector('h2').textContent === 'cluster 1'")
    atlas.open(f"{page}#page=filters&filter=dark")
    atlas.wait("document.querySelectorAll('main .cell').length === 1")
    atlas.open(f"{page}#cluster=1&image=7")
    atlas.wait("document.querySelector('dialog[open] .path')?.textContent === '007.png'")
    atlas.open(f"{page}#clustering=1")
    atlas.wait("byId('clustering').value === '1' && !document.querySelector('dialog[open]')")
    atlas.open(f"{page}#cluster=99")
    atlas.wait("document.querySelector('.empty')?.textContent.includes('no cluster 99')")


def test_filters_find_broken_dark_bright_blurred_and_tiny_images_and_near_duplicates(atlas, page):
    expected = {"broken": [5], "dark": [6], "bright": [7], "blurred": [6, 7, 8], "tiny": [9], "duplicates": [10, 11]}
    for name, images in expected.items():
        atlas.open(f"{page}#page=filters&filter={name}")
        atlas.wait(f"parameters().get('filter') === '{name}'")
        found = atlas.run("[...document.querySelectorAll('main .cell')].map((c) => Number(c.dataset.image))")
        assert sorted(found) == images, name
        if name == "broken":
            assert atlas.run(texts("td.path")) == ["pictures/<u>.txt"]


def test_an_image_shows_its_ten_nearest_images_and_its_probabilities(atlas):
    atlas.run("openImage(20)")
    near = atlas.run("[...document.querySelectorAll('.neighbours .cell')].map((c) => Number(c.dataset.image))")
    embeddings = 4 * np.eye(3)[np.arange(COUNT) % 3] + np.random.default_rng(0).normal(size=(COUNT, 3))
    rows = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert near == np.argsort(-(rows @ rows[20]))[1:11].tolist()
    shares = clusters("", 2, 0).top[1][20]
    assert atlas.run(texts(".right > .probabilities .value")) == [f"{100 * share:.1f} %" for share in shares]
    atlas.click(".neighbours .cell")
    atlas.wait(f"parameters().get('image') === '{near[0]}'")


def place_of(atlas, i: int) -> tuple[float, float]:
    """Return where the map shows an image."""
    code = f"""(() => {{
        const [x, y] = place(theMap, {i});
        const box = theMap.canvas.getBoundingClientRect();
        return [box.x + x, box.y + y];
    }})()"""
    return tuple(atlas.run(code))


def test_the_map_shows_what_is_under_the_mouse(atlas, page):
    atlas.open(f"{page}#page=map")
    atlas.wait("theMap?.drawn?.length > 3")
    atlas.run("(theMap.options.pictures = false, theMap.redraw())")
    atlas.point(place_of(atlas, 20))
    atlas.wait("document.querySelector('.preview:not([hidden]) strong')?.textContent === '020.png'")


def test_a_lasso_lists_images_and_saves_them_as_csv(atlas, page):
    atlas.open(f"{page}#page=map")
    atlas.wait("theMap?.view.width > 0")
    group = [i for i in range(COUNT) if i % 3 == 1]
    places = np.array([place_of(atlas, i) for i in group])
    low, high = places.min(axis=0) - 4, places.max(axis=0) + 4
    inside = [i for i in range(COUNT) if ((low <= place_of(atlas, i)) & (place_of(atlas, i) <= high)).all()]
    atlas.click("main button", "Lasso")
    (left, top), (right, bottom) = low, high
    atlas.point((left, top), (right, top), (right, bottom), (left, bottom), (left, top), pressed=True)
    atlas.wait(f"document.querySelectorAll('.side .cell').length === {len(inside)}")
    atlas.click(".selection button", "Save as CSV")
    with atlas.saved("selection.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    found = clusters("", 2, 0)
    assert sorted(line["path"] for line in lines) == sorted(
        printable(f"pictures/{NAMES[i]}" if i < len(NAMES) else f"pictures/{i:03}.png", reversible=True) for i in inside
    )
    assert {line["cluster"] for line in lines} == {str(found.clusters[i]) for i in inside}
    atlas.saved("selection.csv").unlink()


def test_changes_are_saved_as_names(atlas, page):
    atlas.open(f"{page}#cluster=0")
    atlas.click("main button", "Rename")
    atlas.run("(document.querySelector('#form input').value = 'red <stripes>', 1)")
    atlas.click("#form .primary")
    atlas.wait("document.querySelector('h2').textContent === 'red <stripes>'")
    atlas.run("reject(groupOf(1), true)")
    atlas.run("splitOff([0, 3], 'firsts')")
    atlas.run("merge(groupOf(3), groupOf(2))")
    atlas.click("#save")
    names = json.loads(atlas.saved("names.json").read_text())
    atlas.saved("names.json").unlink()
    assert names == {
        "format": "self-classifier names",
        "version": 1,
        "model": MODEL,
        "classifier": 2,
        "clusters": {"0": {"name": "red <stripes>"}, "1": {"rejected": True}, "3": {"into": 2}},
        "split": [
            {"name": "firsts", "from": 0, "images": ['pictures/say "cheese".png', "pictures/cat 🐈.png"]},
        ],
    }
    atlas.reload()  # the page remembers the changes
    atlas.open(f"{page}#page=clusters")
    atlas.wait("document.querySelectorAll('.tile').length === 4")
    assert atlas.run(texts(".tile h3")) == ["red <stripes>", "cluster 1", "cluster 2", "firsts"]
    atlas.run("separate(groupOf(2))")
    assert atlas.run("groups().length") == 5
    atlas.run("undoAll()")
    assert atlas.run("namesFile(0).clusters") == {}


def test_two_clusterings_and_classes_are_compared(atlas, page):
    atlas.open(f"{page}#page=compare&with=1")
    first, second = clusters("", 0, 0).clusters, clusters("", 0, 1).clusters
    atlas.wait("document.querySelector('.flow')")
    counts = atlas.run("[...document.querySelectorAll('.matrix tbody td')].map((e) => Number(e.textContent))")
    table = np.array([[((first == a) & (second == b)).sum() for b in np.unique(second)] for a in np.unique(first)])
    assert sorted(counts) == sorted(table.ravel().tolist())
    atlas.click(".matrix button")
    atlas.wait("document.querySelectorAll('.detail .cell').length > 0")
    atlas.open(f"{page}#page=classes")
    atlas.wait("document.querySelector('main').textContent.includes('purity 100 %')")
    atlas.open(f"{page}#page=run")
    atlas.wait(
        "document.querySelector('.curve svg').ariaLabel ?? document.querySelector('.curve svg').getAttribute('aria-label')"
    )
    assert atlas.run(texts(".config td")) == ["self_classifier"]


def test_keys_search_move_select_and_open(atlas, page):
    atlas.press("/", *"cat")
    atlas.wait("document.querySelector('h2').textContent === '“cat”'")
    assert atlas.run("[...document.querySelectorAll('main .cell')].map((c) => Number(c.dataset.image))") == [3]
    atlas.press("\ue00c")  # Escape leaves the field
    atlas.press("1")
    atlas.wait("document.querySelector('.tile')")
    atlas.press("]")
    atlas.wait("document.querySelector('h2').textContent === 'cluster 0'")
    first, second = atlas.run("[...document.querySelectorAll('main .cell')].slice(0, 2).map((c) => c.dataset.image)")
    atlas.run("document.querySelector('main .cell').focus()")
    atlas.press("x", "\ue014", "x")  # right
    atlas.wait("document.querySelector('.selection strong').textContent === '2 images selected'")
    atlas.press("\ue007")  # Enter
    atlas.wait(f"parameters().get('image') === '{second}'")
    atlas.press("\ue012")  # left
    atlas.wait(f"parameters().get('image') === '{first}'")


def test_the_theme_switches_and_every_control_has_a_name(atlas):
    colour = "getComputedStyle(document.body).backgroundColor"
    before = atlas.run(colour)
    atlas.click("#theme")
    assert atlas.run(colour) != before
    for name in ("clusters", "map", "filters", "classes", "compare", "run"):
        atlas.run(f"(location.hash = '#page={name}', new Promise((done) => setTimeout(done, 50)))")
        unnamed = """[...document.querySelectorAll("button, a[href], input, select, canvas[role]")].filter((e) => !e.hidden
            && !(e.textContent.trim() || e.ariaLabel || e.getAttribute("aria-label") || e.title || e.labels?.[0]?.textContent.trim()))
            .map((e) => e.outerHTML)"""
        assert atlas.run(unnamed) == [], name


def test_printing_shows_all_tiles(atlas):
    atlas.run("dispatchEvent(new Event('beforeprint'))")
    assert atlas.run("document.querySelectorAll('.strip').length") == 12
