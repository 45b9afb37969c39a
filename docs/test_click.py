"""The promises of docs/click.html, kept in a real browser: `pytest docs/test_click.py`.

A person's mouse, fingers and keys are Playwright's, in the Chromium that the system has. What the
page loads is held against data.py, which reads the same files for train.py.
"""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import data

PAGE = (Path(__file__).parent / "click.html").as_uri()
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
COLUMNS = ["image", "x", "y", "class", "color", "width", "height"]
each = pytest.mark.parametrize


@pytest.fixture(scope="session")
def launch():
    """One browser per ratio of device pixels: an emulated ratio does not reach the canvas."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser")
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome to open docs/click.html in")
    browsers = {}
    with api.sync_playwright() as playwright:

        def launch(ratio):
            if ratio not in browsers:
                flags = [*FLAGS, "--window-size=1200,800", f"--force-device-scale-factor={ratio}"]
                browsers[ratio] = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
            return browsers[ratio]

        yield launch


@pytest.fixture
def visit(launch):
    """Opens docs/click.html as for the first time. `init` runs before the page does."""
    contexts = []

    def visit(ratio=1, init="", **options):
        context = launch(ratio).new_context(no_viewport=True, **options)
        contexts.append(context)
        if init:
            context.add_init_script(init)
        page = open_tab(context)
        page.goto(PAGE)
        return page

    yield visit
    for context in contexts:
        context.close()


def open_tab(context):
    """A tab that answers every question with OK, and lists what its page throws in `wrong`."""
    page = context.new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("dialog", lambda dialog: dialog.accept())
    return page


@pytest.fixture(scope="session")
def context(launch):
    """One for most tests: a new one takes longer than the test itself."""
    return launch(1).new_context(no_viewport=True)


@pytest.fixture
def page(context):
    """docs/click.html as for the first time, at one device pixel per CSS pixel. It never throws."""
    page, *others = context.pages or [open_tab(context)]
    for other in others:
        other.close()
    if page.url == PAGE:
        page.evaluate("localStorage.clear()")
    page.goto(PAGE)
    page.wrong.clear()
    yield page
    assert not page.wrong


@pytest.fixture
def photo(page, tmp_path):
    """A photograph of 60×40 pixels that the page has opened."""
    photo = make_photo(tmp_path / "a.png")
    open_photos(page, photo)
    return photo


def make_photo(path, width=60, height=40, **options):
    """A photograph whose colours say the position."""
    y, x = np.indices((height, width))
    color = np.dstack([x, y, x // 256 * 16 + y // 256]).astype(np.uint8)  # (H, W, 3)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(color).save(path, quality=100, subsampling=0, **options)
    return path


def position(color):
    """The pixel of make_photo's photograph that has this colour."""
    red, green, blue = color
    return red + blue // 16 * 256, green + blue % 16 * 256


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def open_photos(page, *photos):
    """Open them at once and wait for the last one, which must be the first in the list."""
    page.set_input_files("#files", photos)
    wait_for(page, photos[-1])


def wait_for(page, photo):
    page.wait_for_selector(f"#view[data-image$={photo.name[-5:]!r}]")


def wait_until(page, expression):
    """Playwright's wait_for_function is forbidden by the page's own security policy."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"still not: {expression}")


def load(page, name, content):
    page.set_input_files("#load", {"name": name, "mimeType": "", "buffer": content})


def aim(page, dx=0, dy=0):
    """Move the pointer to a place that is told from the canvas's middle."""
    x, y, width, height = page.locator("#view").bounding_box().values()
    place = x + width / 2 + dx, y + height / 2 + dy
    page.mouse.move(*place)
    return place


def click(page, dx=0, dy=0):
    page.mouse.click(*aim(page, dx, dy))


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def colors(page, *places):
    """What the screen shows there."""
    ratio = page.evaluate("devicePixelRatio")
    screen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    return [screen.getpixel((int(x * ratio), int(y * ratio))) for x, y in places]


def save(page):
    """The bytes of clicks.csv."""
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "clicks.csv"
    return Path(download.value.path()).read_bytes()


def parse(content):
    """The rows of a saved file by column."""
    csv.field_size_limit(1_000_000)  # data.py sets it to the length of what it read last
    return list(csv.DictReader(io.StringIO(content.decode())))


def rows(page):
    """Every click as a row of the saved file."""
    return parse(save(page))


def pixels(page):
    return [(int(row["x"]), int(row["y"])) for row in rows(page)]


def classes(page):
    return [row["class"] for row in rows(page)]


def text(page, selector):
    return page.locator(selector).inner_text()


def texts(page, selector):
    return page.locator(selector).all_text_contents()


def message(page):
    """What the page says went wrong."""
    page.wait_for_selector("#message:not(:empty)")
    return text(page, "#message")


# ---- Clicks ----


@each("ratio", [1, 1.5, 2])
def test_a_click_is_the_pixel_whose_colour_the_screen_shows(visit, tmp_path, ratio):
    page = visit(ratio)
    open_photos(page, make_photo(tmp_path / "a.png", 301, 203))
    press(page, "h")

    shown = []
    for wheel in [0, -100, -350, -1050]:
        aim(page, 37, -21)
        page.mouse.wheel(0, wheel)
        page.wait_for_timeout(50)
        places = [aim(page, n * 9.5, n * 5.5) for n in range(9)]
        shown += colors(page, *places)
        for place in places:
            page.mouse.click(*place)

    # A pixel that is clicked again goes to the end of the file.
    in_order = list(dict.fromkeys(position(color) for color in shown[::-1]))[::-1]
    assert pixels(page) == in_order


@each("ratio", [1, 2])
def test_a_browser_that_hides_its_ratio_is_measured(visit, tmp_path, ratio):
    page = visit(ratio, "Object.defineProperty(window, 'devicePixelRatio', { value: 3 })")
    open_photos(page, make_photo(tmp_path / "a.png", 301, 203))
    place = aim(page, 150, -77)
    screen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")

    page.mouse.click(*place)

    assert pixels(page) == [position(screen.getpixel((place[0] * ratio, place[1] * ratio)))]


def test_a_rotated_photograph_is_clicked_as_pillow_rotates_it(page, tmp_path):
    samples = []
    for orientation in range(1, 9):
        photo = tmp_path / f"{orientation}.jpg"
        make_photo(photo, 200, 120, exif=rotated(orientation))
        samples.append(data.Sample(photo.name, photo, None))

    shown = []
    for sample in samples:
        open_photos(page, sample.image)
        shown += colors(page, aim(page, 60, 90))
        click(page, 60, 90)

    (tmp_path / "clicks.csv").write_bytes(save(page))
    data.read_clicks(tmp_path / "clicks.csv", samples, data.read_classes(None))  # sizes, too
    for sample, color in zip(samples, shown):
        [[x, y, _]] = sample.clicks.tolist()
        upright = ImageOps.exif_transpose(Image.open(sample.image))
        assert upright.getpixel((x, y)) == pytest.approx(color, abs=4)


def test_a_photograph_of_one_pixel_is_clicked(page, tmp_path):
    open_photos(page, make_photo(tmp_path / "a.png", 1, 1))

    click(page)

    assert pixels(page) == [(0, 0)]


def test_a_drag_moves_the_photograph_and_clicks_nothing(page, photo):
    before = colors(page, aim(page))

    page.mouse.down()
    place = aim(page, 100, 50)
    page.mouse.up()

    assert colors(page, place) == before
    assert not rows(page)


def test_delete_takes_the_nearest_dot_and_undo_goes_back_across_photographs(page, photo, tmp_path):
    click(page, 3, 3)
    click(page, 60)
    aim(page, 50)

    press(page, "Delete")

    assert pixels(page) == [(30, 20)]

    open_photos(page, make_photo(tmp_path / "b.png"))
    press(page, "Control+z")
    wait_for(page, photo)

    assert len(rows(page)) == 2


def test_classes_are_added_renamed_and_removed_with_their_clicks(page, photo):
    page.click("#add")
    for digit in "61":
        press(page, digit)
        click(page, 50 * int(digit))

    page.locator("#classes [type=text]").last.fill("Pool, blue")
    press(page, "Enter")

    assert classes(page) == ["Pool, blue", "Building"]

    page.locator("#classes button").last.click()

    assert classes(page) == ["Building"]


def test_two_names_that_train_py_takes_for_one_are_refused(page, photo):
    page.locator("#classes [type=text]").last.fill("ROAD")

    press(page, "Enter")

    assert "no other class has" in message(page)


# ---- Fingers ----


def touch(page, *ways):
    """Each finger goes from place to place along its way, all at once."""
    browser = page.context.new_cdp_session(page)

    def send(kind, places):
        points = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(places)]
        browser.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    send("touchStart", [way[0] for way in ways])
    for places in list(zip(*ways))[1:]:
        send("touchMove", places)
    send("touchEnd", [])
    aim(page, -400, -300)
    page.wait_for_timeout(60)


@each("factor", [1, 2, 0.6])
def test_what_two_fingers_hold_stays_under_them(visit, tmp_path, factor):
    page = visit(has_touch=True)
    open_photos(page, make_photo(tmp_path / "a.png", 300, 200))
    x, y = aim(page)
    before = [(x - 60, y - 30), (x + 60, y + 30)]
    after = [(x + 80 + arm * factor, y + 48 + arm * factor / 2) for arm in (-60, 60)]
    held = [position(color) for color in colors(page, *before)]

    touch(page, *[[a, ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2), b] for a, b in zip(before, after)])

    now = [position(color) for color in colors(page, *after)]
    # The scale goes in steps of 4 %, and the arms of the fingers are 20 pixels of the photograph.
    assert np.allclose(now, held, atol=1 if factor == 1 else 2)
    assert not rows(page)


def test_a_tap_labels_and_one_finger_pans(visit, tmp_path):
    page = visit(has_touch=True)
    open_photos(page, make_photo(tmp_path / "a.png", 300, 200))
    x, y = aim(page)
    [held] = colors(page, (x, y))

    touch(page, [(x, y), (x + 40, y + 20), (x + 80, y + 48)])
    touch(page, [(x + 80, y + 48)])

    assert pixels(page) == [position(held)]


# ---- Keys alone ----


# How far the proposed point is from the middle of the canvas.
FROM_MIDDLE = """() => {
  const { x, y } = toPoint(proposal().points[0]);
  return Math.hypot(x - canvas.width / 2, y - canvas.height / 2);
}"""


def test_a_person_without_a_mouse_labels_100_points_on_40_megapixels(page, tmp_path):
    photo = tmp_path / "large.jpg"
    Image.linear_gradient("L").resize((7680, 5216)).save(photo, quality=60)
    # Ask for file choosers early: the browser may open the first one before it hears of it.
    page.on("filechooser", lambda chooser: None)

    def tab_to(selector):
        for _ in range(40):
            if page.evaluate("(s) => document.activeElement.matches(s)", selector):
                return
            press(page, "Tab")
        raise AssertionError(f"Tab does not lead to {selector}")

    tab_to("#files")
    with page.expect_file_chooser() as chooser:
        press(page, "Enter")
    chooser.value.set_files(photo)
    wait_for(page, photo)
    fitted = page.evaluate("view.scale")
    tab_to("#propose")
    press(page, "Enter", *"+=+=+=+=+=+=-+")
    zoomed = page.evaluate("view.scale")
    for n in range(100):
        assert page.evaluate(FROM_MIDDLE) <= 1
        press(page, "12345"[n % 5])
    tab_to("#save")
    with page.expect_download() as download:
        press(page, "Enter")

    saved = parse(Path(download.value.path()).read_bytes())
    assert zoomed == pytest.approx(fitted * 1.25**12, rel=0.05)
    assert len({(row["x"], row["y"]) for row in saved}) == 100
    assert [row["class"] for row in saved[:5]] == list(data.CLASSES)
    assert "Clicks here: 100 of 100" in page.evaluate("nextStep()")


def test_proposed_points_are_labelled_by_keys_and_passed_by_space(page, tmp_path):
    open_photos(page, make_photo(tmp_path / "a.png", 12, 9))
    page.click("#propose")

    press(page, *"12345" * 19, "Space", "Space", "Control+z", *"123", "Enter")

    assert len(set(pixels(page))) == 99
    assert set(classes(page)[::5]) == {"Building"}
    assert classes(page)[-1] == "Road"  # Enter labels with the class that is chosen


def test_the_slider_keeps_its_arrows_while_tab_led_to_it(page, photo, tmp_path):
    open_photos(page, make_photo(tmp_path / "b.png"))
    page.set_input_files("#maps", make_photo(tmp_path / "maps/b.png").parent)
    page.focus("#clear")
    press(page, "Tab")

    press(page, "ArrowLeft", "ArrowLeft", "Home", "ArrowRight")

    assert page.input_value("#opacity") == "1"
    assert page.get_attribute("#view", "data-image") == "b.png"


def test_tab_leads_to_the_lists_and_to_the_canvas_which_show_it(page, photo, tmp_path):
    open_photos(page, make_photo(tmp_path / "b.png"))
    outline = "(id) => getComputedStyle(document.querySelector(id)).outlineStyle"
    page.focus("#clear")

    press(page, "Tab")
    focused = texts(page, "#images li:focus")
    press(page, "ArrowUp")
    wait_for(page, photo)

    assert focused == ["b.png"]
    assert texts(page, "#images li:focus") == ["a.png"]

    for _ in range(30):
        press(page, "Tab")
        if page.evaluate("document.activeElement.id") == "view":
            break

    assert page.evaluate(outline, "#view") == "solid"


def test_a_tenth_class_is_chosen_without_a_mouse(page, photo):
    for _ in range(6):
        page.click("#add")

    page.locator("#classes [type=text]").nth(9).focus()
    press(page, "Enter")
    page.click("#propose")
    press(page, "Enter")

    assert classes(page) == ["Class 10"]


# ---- Saving ----


def test_save_is_one_file_that_is_complete(page, photo):
    downloads = []
    page.on("download", lambda download: downloads.append(download))
    press(page, "3")
    click(page)

    content = save(page)
    page.wait_for_timeout(400)

    assert content.decode() == ",".join(COLUMNS) + "\na.png,30,20,Road,#CC79A7,60,40\n"
    assert len(downloads) == 1


def test_the_hint_after_saving_is_the_next_command(page, tmp_path):
    make_photo(tmp_path / "My photos/a.png")
    page.set_input_files("#folder", tmp_path / "My photos")
    page.wait_for_selector("#view[data-image='a.png']")

    save(page)

    assert 'python train.py --data "My photos" --clicks clicks.csv' in text(page, "#hint")
    assert "clicks(1).csv" in text(page, "#hint")


def test_the_hint_after_saving_takes_my_photos_for_a_folder_without_a_name(page, photo):
    save(page)

    assert "python train.py --data my_photos --clicks clicks.csv" in text(page, "#hint")


# ---- The store ----

REFUSES = "() => { Storage.prototype.setItem = () => { throw new DOMException() } }"
THROWS = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException() } })"


def test_two_tabs_share_their_clicks(page, photo):
    other = page.context.new_page()
    other.goto(PAGE)

    click(page)
    other.wait_for_selector("#images .closed")
    other.click("#undo")
    page.wait_for_selector("#images li:not([data-clicks='1'])")

    assert not rows(page)


def test_a_full_store_is_told_and_closing_warns(page, photo):
    page.evaluate(REFUSES)

    click(page)
    told = message(page)
    with page.expect_event("close"), page.expect_event("dialog") as dialog:
        page.close(run_before_unload=True)

    assert "save before" in told and dialog.value.type == "beforeunload"


def test_clicks_that_the_store_refused_outlast_a_save_and_a_focus(page, photo):
    for n in range(5):
        if n == 2:
            page.evaluate(REFUSES)
        click(page, 40 * n)

    save(page)
    page.evaluate("() => window.dispatchEvent(new Event('focus'))")

    assert len(rows(page)) == 5

    other = page.context.new_page()
    other.goto(PAGE)
    other.click("#add")  # it stores the two clicks that it knows
    page.bring_to_front()
    page.evaluate("() => window.dispatchEvent(new Event('focus'))")

    assert len(rows(page)) == 5


def test_a_store_that_throws_leaves_the_page_working(visit, tmp_path):
    page = visit(init=THROWS)
    told = message(page)
    open_photos(page, make_photo(tmp_path / "a.png"))

    page.evaluate("() => window.dispatchEvent(new Event('focus'))")
    click(page)

    assert "does not keep the clicks" in told
    assert "does not keep the clicks" in message(page)
    assert len(rows(page)) == 1
    assert not page.wrong


OTHER_SHAPES = [
    "null",
    "no JSON",
    '{"clicks": []}',
    '{"classes": [], "clicks": 5, "proposed": null}',
    '{"classes": [{"class": "a"}], "clicks": [], "proposed": null}',
    '{"classes": [], "clicks": [{"image": "a", "x": 1, "y": 1, "class": "a"}], "proposed": null}',
]


def test_a_state_of_another_shape_is_left_alone_and_told(page):
    for shape in OTHER_SHAPES:
        page.evaluate("(text) => localStorage.setItem(KEY, text)", shape)

        page.reload()
        told = message(page)
        page.click("#add")
        page.evaluate("() => window.dispatchEvent(new Event('focus'))")

        assert "something else lies there" in told
        assert page.evaluate("localStorage.getItem(KEY)") == shape
        assert page.locator("#classes li").count() == 6


def test_a_store_that_fills_up_is_told_while_there_is_room(page, photo):
    many = "image,x,y,class\n" + "".join(f"{'b' * 800}.png,{x},0,Land\n" for x in range(4900))

    load(page, "clicks.csv", many.encode())

    assert "four fifths full" in message(page)
    assert page.evaluate("localStorage.getItem(KEY).length") > 4e6


# ---- Loading: as train.py reads the same file ----

NAMES = b"image,x,y,class\n"
READ = [  # the file, what it means
    ("plain", NAMES + b"a.png,12,20,Land\n"),
    ("scientific", NAMES + b"a.png,1.2000000e+01,2.0e1,Land\n"),
    ("underscores", NAMES + b"a.png,1_2,+20.,Land\n"),
    ("semicolons and capitals", b"Image;X;Y;Class\na.png;12;20;Land\n"),
    ("tabs", b"image\tx\ty\tclass\na.png\t12\t20\tLand\n"),
    ("decimal commas", b"image;x;y;class\na.png;12,7;20,25;Land\n"),
    ("sep=", b"sep=;\r\nimage;x;y;class\r\na.png;12;20;Land\r\n"),
    ("sep=|", b"sep=|\nimage|x|y|class\na.png|12|20|Land\n"),
    ("UTF-16 little", "image,x,y,class\na.png,12,20,Land\n".encode("utf-16")),
    ("UTF-16 big", "\ufeffimage,x,y,class\na.png,12,20,Land\n".encode("utf-16-be")),
    ("a mark of UTF-8", b"\xef\xbb\xbf" + NAMES + b"a.png,12,20,Land\n"),
    ("blanks", b"image , x, y, class\n a.png , 12, 20 , Land\n\n ,,\n"),
    ("quotes", b'"image","x","y","class"\n"a.png", "12","20","Land"\n'),
    ("a quote within a cell", b'image,x,y,class,note\na.png,12,20,Land,5" pipe 6"\n'),
    ("a column more", b"id,image,x,y,class\n7,a.png,12,20,Land\n"),
    ("its size", b"image,x,y,class,width,height\na.png,12,20,Land,60,40.0\n"),
    ("the far edge", NAMES + b"a.png,60,40,Land\n"),
    ("the same twice", NAMES + b"a.png,12,20,Land\na.png,12.5,20.5,land\n"),
    ("a class by its number", NAMES + b"a.png,12,20,1.0\n"),
    ("returns alone", b"image,x,y,class\ra.png,12,20,Land\r"),
]
REFUSED = [  # the file, a part of the reason that both give
    ("a thousands' comma", NAMES + b'a.png,"1,032",20,Land\n', "line 2: is the comma in 1,032"),
    ("Windows-1252", NAMES + b"a.png,12,20,Geb\xe4ude\n", "save it as CSV UTF-8"),
    ("a quote that stays open", NAMES + b'a.png,12,20,"Land\n', "a quote is never closed"),
    ("more cells", NAMES + b"a.png,12,20,Land,7\n", "has more cells than the header"),
    ("two columns", b"image,x,y,X,class\na.png,12,20,3,Land\n", "two columns are called x or X"),
    ("no header", b"a.png,12,20,Land\n", "line 1 must have image,x,y,class"),
    ("a blank line first", b"\nimage,x,y,class\na.png,12,20,Land\n", "line 1 must have"),
    ("nothing", b"", "line 1 must have"),
    ("outside", NAMES + b"a.png,1000,20,Land\n", "outside the 60×40 pixels of a.png"),
    ("below zero", NAMES + b"a.png,-1,20,Land\n", "outside the 60×40 pixels of a.png"),
    ("infinitely far", NAMES + b"a.png,1e999,20,Land\n", "outside the 60×40 pixels of a.png"),
    ("another size", b"image,x,y,class,width,height\na.png,1,2,Land,40,60\n", "made on 40×60"),
    ("half a size", b"image,x,y,class,width,height\na.png,1,2,Land,60,\n", "line 2: "),
    ("two classes", NAMES + b"a.png,1,2,Land\na.png,1,2,Road\n", "another class in"),
    ("no number", NAMES + b"a.png,12px,20,Land\n", "line 2: "),
    ("hexadecimal", NAMES + b"a.png,0x0C,20,Land\n", "line 2: "),
    ("nothing for x", NAMES + b"a.png,,20,Land\n", "line 2: "),
    ("no class", NAMES + b"a.png,12,20,\n", "line 2: "),
    ("a number of no class", NAMES + b"a.png,12,20,9\n", "line 2: "),
    ("no image", NAMES + b",12,20,Land\n", "line 2: "),
    ("a break", b'image,x,y,class,n\na.png,1,2,Land,"a\nb"\na.png,?,2,Land\n', "line 4: "),
]


def read_by_data(content, photo):
    """The clicks as data.py reads them for train.py: x, y, name of the class."""
    path = photo.with_name("clicks.csv")
    path.write_bytes(content)
    sample = data.Sample("a.png", photo, None)
    data.read_clicks(path, [sample], data.read_classes(None))
    return [(x, y, data.CLASSES[c]) for x, y, c in sample.clicks.tolist()]


def read_by_page(page, content):
    """The clicks as the page loads them: x, y, name of the class."""
    page.click("#clear")
    load(page, "clicks.csv", content)
    page.wait_for_selector("#images [data-clicks='1']")
    clicks = page.evaluate("state.clicks")
    return [(click["x"], click["y"], click["class"]) for click in clicks]


def test_a_file_means_the_same_in_the_page_and_in_train_py(page, photo):
    by_page = {name: read_by_page(page, content) for name, content in READ}

    by_data = {name: read_by_data(content, photo) for name, content in READ}
    assert by_page == by_data


def test_a_file_is_refused_in_the_page_and_in_train_py_for_one_reason(page, photo):
    told = []
    for name, content, reason in REFUSED:
        load(page, f"{name}.csv", content)
        wait_until(page, f"byId('message').textContent.startsWith({name!r})")
        told.append(text(page, "#message"))

    for (name, content, reason), said in zip(REFUSED, told):
        with pytest.raises(data.UserError) as error:
            read_by_data(content, photo)
        assert reason in said and reason in str(error.value), name
    assert not rows(page)


COLORED = b"image,x,y,class,color\n"
CONFLICTS = [  # the file, the lines that both name
    (b"a.png,1,2,a,#0000ff\na.png,2,2,a,#00FF00\n", ["line 3", "line 2"]),
    (b"a.png,1,2,a,#0000FF\na.png,2,2,b,#0000ff\n", ["line 3", "line 2"]),
    (b"a.png,1,2,a,#0000FF\na.png,2,2,A,#0000ff\n", ["line 3", "line 2"]),
    (b"a.png,1,2,a,\na.png,1,2,b,blueish\n", ["line 3"]),
    (b"a.png,1,2,a,7\n", ["line 2"]),
]


def test_one_colour_a_class_and_one_class_a_colour(page, photo, tmp_path):
    path = tmp_path / "clicks.csv"
    for content, lines in CONFLICTS:
        path.write_bytes(COLORED + content)

        load(page, "clicks.csv", COLORED + content)
        told = message(page)
        with pytest.raises(data.UserError) as error:
            data.read_classes(None, clicks=path)

        assert all(line in told and line in str(error.value) for line in lines), content
    assert not rows(page)


def test_colours_come_with_the_clicks_and_a_blank_one_says_nothing(page, photo):
    load(page, "clicks.csv", COLORED + b"a.png,1,2,a,#0000ff\na.png,2,2,A,\na.png,3,2,b,#00ff00\n")
    page.wait_for_selector("#images [data-clicks='3']")

    saved = rows(page)

    assert [row["class"] for row in saved] == ["a", "a", "b"]
    assert [row["color"] for row in saved] == ["#0000FF", "#0000FF", "#00FF00"]


def test_a_class_without_a_colour_beside_others_with_one_is_refused(page, photo):
    load(page, "clicks.csv", COLORED + b"a.png,1,2,a,#0000ff\na.png,3,2,b,\n")

    told = message(page)

    assert "line 3" in told and not rows(page)


def test_a_file_of_classes_replaces_those_without_a_click(page, photo):
    press(page, "2")
    click(page)

    load(page, "classes.csv", b"class,color\nroof,#112233\npool,#445566\n,#000000\n")
    page.wait_for_selector("#classes li:nth-child(3):last-child")

    names = page.eval_on_selector_all("#classes [type=text]", "(all) => all.map((e) => e.value)")
    assert names == ["roof", "pool", "Land"]


@each("columns", ["", ",60,40"])
def test_clicks_loaded_before_their_photograph_are_held_against_it(page, tmp_path, columns):
    header = b"image,x,y,class" + (b",width,height" if columns else b"")
    row = f"\na.png,100,20,Land{columns and ',120,40'}\na.png,10,20,Land{columns}\n"
    load(page, "clicks.csv", header + row.encode())
    page.wait_for_selector("#images .closed")

    open_photos(page, make_photo(tmp_path / "a.png"))

    assert "Clicks are removed" in message(page)
    assert pixels(page) == [(10, 20)]


def test_reloading_and_loading_bring_every_byte_back(page, tmp_path):
    open_photos(page, make_photo(tmp_path / 'a, "b" c.png'))
    click(page)
    page.click("#add")
    press(page, "6")
    click(page, 30)
    saved = save(page)

    page.reload()

    assert save(page) == saved

    page.evaluate("localStorage.clear()")
    page.reload()  # now nothing is open, and nothing stored
    load(page, "clicks (1).csv", saved)
    page.wait_for_selector("#images .closed")

    assert save(page) == saved


# ---- Opening ----


def test_photographs_are_of_the_types_that_train_py_reads(page):
    types = page.evaluate("IMAGE_TYPES")

    assert sorted(types) == sorted(data.IMAGE_TYPES)


def test_photographs_of_other_types_are_opened(page, tmp_path):
    for name in ["a.gif", "B.JFIF", "c.bmp", "d.webp"]:
        photo = tmp_path / name
        Image.new("RGB", (60, 40), "red").save(photo, "JPEG" if name == "B.JFIF" else None)

        open_photos(page, photo)

        assert colors(page, aim(page)) == [pytest.approx((255, 0, 0), abs=2)]


@each("name", ["b.jpg", "b.tif", "b.webp"])
def test_what_cannot_be_shown_is_named_and_the_next_is_opened(page, photo, tmp_path, name):
    broken = make_photo(tmp_path / name, exif=rotated(6))
    if name == "b.jpg":
        broken.write_bytes(b"no picture")

    open_photos(page, broken, make_photo(tmp_path / "c.png"))

    assert message(page).startswith(name)
    assert texts(page, "#images li") == ["a.png", "c.png"]


def test_a_name_from_a_file_runs_nothing(page, tmp_path):
    photo = make_photo(tmp_path / "<img src=x onerror=alert(1)>.png")

    open_photos(page, photo)
    click(page)

    assert texts(page, "#images li") == [photo.name]
    assert not texts(page, "img")


def test_a_folder_that_is_dropped_is_called_a_folder(page, tmp_path):
    folder = make_photo(tmp_path / "my_photos/a.png").parent
    x, y = aim(page)
    browser = page.context.new_cdp_session(page)
    dropped = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}

    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": x, "y": y, "data": dropped}
        browser.send("Input.dispatchDragEvent", event)

    assert "Open folder" in message(page)
    assert "no photograph" not in message(page)


def test_beside_the_button_stands_that_nothing_leaves_the_machine(page):
    assert "Nothing leaves this machine" in text(page, ".button.main + *")


# ---- Maps ----


def open_maps(page, folder, *maps):
    """Each map is a name and a picture."""
    folder.mkdir()
    for name, picture in maps:
        picture.save(folder / name)
    page.set_input_files("#maps", folder)
    page.fill("#opacity", "100")
    wait_until(page, "Boolean(shown.map || byId('message').textContent)")


def test_maps_are_laid_over_photographs_of_their_size_alone(page, photo, tmp_path):
    red, grey = Image.new("RGB", (60, 40), "red"), Image.new("L", (30, 20))
    open_maps(page, tmp_path / "maps", ("a.png", red), ("a_confidence.png", grey))
    shown = colors(page, aim(page))

    press(page, "m")

    assert shown == [(255, 0, 0)]
    assert "30×20 pixels, its photograph 60×40" in message(page)


def test_confidence_maps_alone_are_shown(page, photo, tmp_path):
    grey = Image.new("L", (60, 40), 77)

    open_maps(page, tmp_path / "maps", ("a_confidence.png", grey))

    assert colors(page, aim(page)) == [(77, 77, 77)]
    assert "confidence" in text(page, "#overlay")


def test_the_hint_keeps_class_and_count_while_maps_are_open(page, photo, tmp_path):
    press(page, "3")
    click(page)

    open_maps(page, tmp_path / "maps", ("a.png", Image.new("RGB", (60, 40))))

    assert "Next click: Road. Clicks here: 1 of 100." in text(page, "#hint")


# ---- Colours ----

# The contrast of each text to the nearest background that is not transparent (WCAG 2).
CONTRASTS = """() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = color;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgba(color).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const color = element ? getComputedStyle(element).backgroundColor : "Canvas";
    return !element || rgba(color)[3] === 255 ? color : ground(element.parentElement);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!element.checkVisibility() || !(own || element.matches("[type=text], li"))) continue;
    for (const pseudo of [null, "::after"]) {
      const style = getComputedStyle(element, pseudo);
      if (pseudo && style.content === "none") continue;
      const [a, b] = [light(style.color), light(ground(element))].sort((one, two) => two - one);
      const opacity = Number(getComputedStyle(element).opacity);
      found.push([(a + 0.05) / (b + 0.05) * opacity, element.outerHTML.slice(0, 60)]);
    }
  }
  return found;
}"""


STATES = [".main", ".button:not(.main)", "#save", "#add", "#images li", ".closed", "#classes li"]


@each("forced", ["none", "active"])
@each("scheme", ["light", "dark"])
def test_every_text_has_a_contrast_of_4_5_in_every_state(visit, tmp_path, scheme, forced):
    page = visit(color_scheme=scheme, forced_colors=forced)
    load(page, "clicks.csv", NAMES + b"closed.png,12,20,Land\n")
    found = page.evaluate(CONTRASTS)
    open_photos(page, make_photo(tmp_path / "b.png"), make_photo(tmp_path / "a.png"))
    click(page)
    open_maps(page, tmp_path / "maps", ("a.png", Image.new("RGB", (6, 4))))

    for selector in STATES:
        page.locator(selector).first.hover()
        found += page.evaluate(CONTRASTS)
    press(page, "Tab")
    found += page.evaluate(CONTRASTS)

    assert "6×4" in message(page)
    assert len(found) > 500
    assert min(found)[0] >= 4.5, min(found)


def test_the_current_rows_can_be_told_apart_in_forced_colours(visit, tmp_path):
    page = visit(forced_colors="active")

    open_photos(page, make_photo(tmp_path / "b.png"), make_photo(tmp_path / "a.png"))

    for rows in ("#images", "#classes"):
        boxes = [page.locator(f"{rows} li").nth(n).bounding_box() for n in (0, 1)]
        current, other = colors(page, *[(box["x"] + 4, box["y"] + 14) for box in boxes])
        assert abs(sum(current) - sum(other)) > 200  # of 765 between black and white
