"""The embedded sets `photos` and `solids`: files and credits, what a scene must satisfy, the
renderer against closed forms and brute force, and that build.py makes the same files again."""

import importlib
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT

from kernels.readers import FOCAL, PHOTOS, SOLIDS, decode_webp, load_photos, load_solids

SPLITS = ("train", "test")
EACH_SPLIT = pytest.mark.parametrize("split", SPLITS)


def module_of_data(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests" / "data"))
        return importlib.import_module(name)


scenes = module_of_data("scenes")
build = module_of_data("build")


@pytest.fixture(scope="module")
def photos():
    return dict(np.load(PHOTOS))


@pytest.fixture(scope="module")
def pictures():
    return {split: load_photos(split) for split in SPLITS}


@pytest.fixture(scope="module")
def solids():
    return {split: load_solids(split) for split in SPLITS}


@pytest.fixture(scope="module")
def rendered(photos):
    """Five scenes, as (picture, Labels, Scene), which together show all shapes."""
    textures = scenes.textures(photos, "test")
    found = [scenes.render((109, number), textures) for number in range(5)]
    assert {s.shape for _, _, scene in found for s in scene.solids} == set(range(8))
    return found


# -------- Photographs -----------------------------------------------------------------------------


def test_photographs(pictures):
    counts = []
    for split, count in (("train", 156), ("test", 50)):
        found = pictures[split]
        assert len(found.images) == len(found.names) == len(found.labels) == count
        assert found.labels.dtype == torch.int64
        for image in found.images:
            assert image.dtype == torch.uint8 and image.shape[0] == 3
            assert min(image.shape[1:]) == 128 and image.float().std() > 10
        counts.append(found.labels.bincount())
        assert found.kinds == ("monuments", "tools", "energy", "fishes", "animals", "others")
    share = counts[1] / (counts[0] + counts[1])
    assert (share - 0.25).abs().max() < 0.03  # a quarter of the subjects of each kind
    assert found.names[found.labels.tolist().index(4)] == "cow"
    assert PHOTOS.stat().st_size < 1.5e6  # bytes


def test_photographs_are_free_and_on_one_side_only(photos):
    def all_of(name):
        return [set(photos[f"{split}_{name}"].tolist()) for split in SPLITS]

    assert all_of("licences") == [{"Public Domain", "CC0-1.0"}] * 2
    for name in ("names", "sources"):  # a source is the address of one photograph
        train, test = all_of(name)
        assert not train & test
        assert len(train) == 156 and len(test) == 50 and "" not in train | test
    assert all(author for authors in all_of("authors") for author in authors)
    side = {name: split for split in SPLITS for name in photos[f"{split}_names"].tolist()}
    for name, other in build.SUBJECTS.items():
        assert side[name] == side[other]


def test_no_photograph_looks_like_one_of_the_other_side(pictures):
    """Correlation of thumbnails, 12 x 12. Of copies it is above 0.99, of two different photographs
    of windmills, which look most alike, 0.9."""
    thumbnails = []
    for split in SPLITS:
        images = [x[None].float() for x in pictures[split].images]
        small = [torch.nn.functional.adaptive_avg_pool2d(x, 12).flatten() for x in images]
        small = torch.stack(small)
        small = small - small.mean(1, keepdim=True)
        thumbnails.append(torch.nn.functional.normalize(small, dim=1))
    train, test = thumbnails
    assert (train @ test.T).max() < 0.95


def test_credits_are_read_from_a_readme():
    readme = """Copyright: Ann Author
Source: https://example.org/File:One_(1).jpg
License: CC0-1.0
Files:
a/one.webp
screDriver.webp

Copyright: 2000, 2008 Bob and others
License: GPLv3
Files:
two.ogg"""
    ann = ("Ann Author", "https://example.org/File:One_(1).jpg", "CC0-1.0")
    bob = ("2000, 2008 Bob and others", "", "GPLv3")
    expected = {"a/one.webp": ann, "screwDriver.webp": ann, "two.ogg": bob}
    assert build.credits_of(readme) == expected


def test_resource_archives_are_read(tmp_path):
    """An archive of Qt's format, version 1, with one plain and one compressed file in a folder."""
    contents = [b"plain", struct.pack(">I", 9) + zlib.compress(b"squeezed!")]
    names = [struct.pack(">HI", len(n), 0) + n.encode("utf-16-be") for n in ("dir", "a", "b")]
    at = np.cumsum([0, *map(len, names)]).tolist()
    tree = struct.pack(">iH2i", 0, 2, 1, 1)  # the root: a folder of 1 child, record 1
    tree += struct.pack(">iH2i", at[0], 2, 2, 2)  # dir: 2 children, from record 2
    tree += struct.pack(">iH2Hi", at[1], 0, 0, 0, 0)  # a: its data begin at 0
    tree += struct.pack(">iH2Hi", at[2], 1, 0, 0, 4 + len(contents[0]))  # b: compressed
    data = b"".join(struct.pack(">i", len(c)) + c for c in contents)
    starts = [20, 20 + len(tree), 20 + len(tree) + len(data)]
    archive = struct.pack(">4s4i", b"qres", 1, *starts) + tree + data + b"".join(names)
    (tmp_path / "x.rcc").write_bytes(archive)
    found = build.qt_resources(tmp_path / "x.rcc")
    assert found == {"/dir/a": b"plain", "/dir/b": b"squeezed!"}


# -------- The embedded scenes ---------------------------------------------------------------------


@EACH_SPLIT
def test_fields_of_the_scenes(solids, split):
    found = solids[split]
    count = {"train": 1000, "test": 250}[split]
    shapes = {
        "images": ((count, 3, 48, 48), torch.uint8),
        "instances": ((count, 48, 48), torch.uint8),
        "classes": ((count, 48, 48), torch.uint8),
        "depth": ((count, 48, 48), torch.float32),
        "normals": ((count, 3, 48, 48), torch.float32),
        "keypoints": ((count, 4, 9, 3), torch.float32),
    }
    for name, (shape, dtype) in shapes.items():
        tensor = getattr(found, name)
        assert (tensor.shape, tensor.dtype) == (shape, dtype), name
        assert tensor.is_contiguous()
    for name in ("boxes", "labels", "areas", "whole"):
        assert len(getattr(found, name)) == count
    numbers = torch.tensor([len(boxes) for boxes in found.boxes])
    assert numbers.unique().tolist() == [2, 3, 4]
    assert found.names == ("background", *scenes.SHAPES)
    assert SOLIDS.stat().st_size < 3.6e6  # bytes
    assert FOCAL == scenes.FOCAL


@EACH_SPLIT
def test_boxes_labels_and_areas_are_those_of_the_masks(solids, split):
    found = solids[split]
    assert torch.equal(found.classes == 0, found.instances == 0)
    for i, boxes in enumerate(found.boxes[:250]):
        assert found.instances[i].max() == len(boxes)
        for j, box in enumerate(boxes.tolist()):
            mask = found.instances[i] == j + 1
            rows = mask.any(1).nonzero()
            columns = mask.any(0).nonzero()
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box == [int(x) for x in expected]
            assert found.classes[i][mask].unique().tolist() == [found.labels[i][j]]
            assert found.areas[i][j] == mask.sum()
    areas = torch.cat(found.areas)
    whole = torch.cat(found.whole)
    assert (areas <= whole).all()
    assert areas.min() >= 30 and (areas >= 0.4 * whole).all()  # no object is nearly hidden
    assert (areas < whole).float().mean() > 0.2  # but many are partly


@EACH_SPLIT
def test_shapes_are_alike_often(solids, split):
    """Each shape is drawn with probability 1/8, independently: within four standard deviations."""
    labels = torch.cat(solids[split].labels)
    counts = labels.bincount(minlength=9)
    assert counts[0] == 0 and len(counts) == 9
    expected = len(labels) / 8
    assert (counts[1:] - expected).abs().max() < 4 * (expected * 7 / 8) ** 0.5


def points_of(depth):
    """Points (N, 3, 48, 48) in camera coordinates from depths (N, 48, 48)."""
    centres = torch.arange(48) + 0.5
    x = (centres[None, :] - 24) / FOCAL
    y = (centres[:, None] - 24) / FOCAL
    return torch.stack([x * depth, y * depth, depth], 1)


DENSE = ("instances", "classes", "depth", "normals")


@EACH_SPLIT
def test_stored_normals_are_units_that_face_the_camera_as_the_depth_says(solids, split):
    """The cross product of the surface's differences over two pixels; only where the nine pixels
    around belong to one object (or the floor) and have nearly one normal. Without crosses, whose
    parallel faces may lie side by side."""
    found = solids[split]
    found = found._replace(**{name: getattr(found, name)[:100] for name in DENSE})
    valid = found.depth > 0
    normals = found.normals
    assert (normals.norm(dim=1) - valid.float()).abs().max() < 1e-5  # 0 in the sky
    assert (found.instances[~valid] == 0).all()
    points = points_of(found.depth)
    # int8 turns a normal by 0.4 degrees at most; seen edge-on, its back may then show
    assert ((normals * points).sum(1) / points.norm(dim=1).clamp(min=1e-9)).max() < 0.007

    across = points[..., 1:-1, 2:] - points[..., 1:-1, :-2]
    down = points[..., 2:, 1:-1] - points[..., :-2, 1:-1]
    measured = torch.nn.functional.normalize(torch.linalg.cross(down, across, dim=1), dim=1)
    inner = normals[..., 1:-1, 1:-1]
    crosses = found.classes == found.names.index("cross")
    smooth = (valid & ~crosses)[:, 1:-1, 1:-1]
    for i in range(3):
        for j in range(3):
            part = slice(i, i + 46), slice(j, j + 46)
            same = found.instances[:, *part] == found.instances[:, 1:-1, 1:-1]
            near = (normals[:, :, *part] * inner).sum(1) > 0.97  # 14 degrees
            smooth = smooth & same & near & valid[:, *part]
    angle = torch.rad2deg((measured * inner).sum(1).clamp(-1, 1).acos())[smooth]
    objects = found.instances[:, 1:-1, 1:-1][smooth] > 0
    assert smooth.float().mean() > 0.6 and objects.sum() > 40 * len(normals)
    # depth is rounded to 1/256: over two pixels, about 0.15 units, this alone turns 1.5 degrees
    assert angle[objects].mean() < 1.5 and angle[objects].quantile(0.99) < 3
    assert angle[~objects].max() < 3


@EACH_SPLIT
def test_stored_keypoints_agree_with_masks_and_states(solids, split):
    found = solids[split]
    counts = torch.tensor([len(shape.points) for shape in scenes.SHAPES.values()])
    for i, labels in enumerate(found.labels[:250]):
        x, y, state = found.keypoints[i].unbind(-1)  # (4, 9)
        number = torch.zeros(4, dtype=torch.long)
        number[: len(labels)] = 1 + counts[labels - 1]
        assert torch.equal((state >= 0).sum(1), number)
        assert (found.keypoints[i][state == -1] == torch.tensor([0.0, 0, -1])).all()
        visible = state == 1
        inside = (x >= 0) & (x < 48) & (y >= 0) & (y < 48)
        assert (inside | ~visible).all()
        # Where the centre is visible and the object has no hole, the object is what is seen, or it
        # begins beside this pixel.
        for j, label in enumerate(labels.tolist()):
            if visible[j, 0] and found.names[label] != "torus":
                row = int(y[j, 0])
                column = int(x[j, 0])
                around = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
                assert (found.instances[i][around] == j + 1).any()
        # If nothing hides the object, visible points of its surface lie in its box, up to two
        # pixels: a tip may be too thin to be met by the ray of any pixel.
        for j, (x0, y0, x1, y1) in enumerate(found.boxes[i].tolist()):
            shown = visible[j] & (found.areas[i][j] == found.whole[i][j])
            shown[0] = False
            assert ((x[j] > x0 - 2) & (x[j] < x1 + 2))[shown].all()
            assert ((y[j] > y0 - 2) & (y[j] < y1 + 2))[shown].all()


def test_bad_calls_end_in_one_sentence(capsys, tmp_path):
    bad = {"train or test": ("val",), "is missing": ("train", tmp_path / "x")}
    for words, arguments in bad.items():
        for load in (load_solids, load_photos):
            with pytest.raises(SystemExit):
                load(*arguments)
            error = capsys.readouterr().err
            assert words in error and len(error.splitlines()) == 1


# -------- The renderer ----------------------------------------------------------------------------


def directions(count, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, 3))
    return vectors / scenes.norm(vectors)[:, None]


@pytest.mark.parametrize("name", scenes.NAMES)
def test_shapes(name):
    """f: 1-Lipschitz (so no ray passes a surface), zero at corners and tips; reach and radius: of
    points of the surface, found by rays from all sides towards points inside."""
    shape = scenes.SHAPES[name]
    rng = np.random.default_rng(1)
    a = rng.uniform(-2, 2, (2000, 3))
    b = a + rng.normal(size=(2000, 3)) * rng.uniform(0, 1, (2000, 1))
    change = np.abs(shape.distance(a) - shape.distance(b))
    assert (change <= scenes.norm(a - b) + 1e-12).all()
    if len(shape.points):
        assert np.abs(shape.distance(shape.points)).max() < 1e-12

    solid = scenes.Solid(scenes.NAMES.index(name), 1.0, np.eye(3), np.zeros(3), 0, None, None)
    surface = []
    for origin in 3 * directions(12):
        towards = rng.uniform(-0.9, 0.9, (600, 3)) - origin
        rays = towards / scenes.norm(towards)[:, None]
        length = scenes.trace_solid(solid, origin, rays)
        hit = length < np.inf
        surface.append(origin + length[hit, None] * rays[hit])
    surface = np.concatenate(surface)
    assert len(surface) > 1500
    assert np.abs(shape.distance(surface)).max() < 2e-6  # a ray ends with a step below 1e-6
    assert scenes.norm(surface).max() <= shape.radius + 1e-9
    for d in directions(20, seed=2):
        farthest = (surface @ d).max()
        assert shape.reach(d) - 0.1 < farthest <= shape.reach(d) + 1e-9


def test_a_sphere_against_closed_forms():
    """Mask, depth, normal, box and centre of a sphere; depth and normal of the floor."""
    centre = np.array([0.3, -0.2, 0.6])
    ball = scenes.Solid(0, 0.8, np.eye(3), centre, 0, np.zeros(2), np.zeros(3))  # radius 0.6
    forward = np.array([0.0, 0.8, -0.6])
    down = np.array([0.0, -0.6, -0.8])
    axes = np.stack([[1.0, 0, 0], down, forward])
    eye = np.array([0.1, -3.0, 2.5])
    scene = scenes.Scene([ball], eye, axes, scenes.Z, 0, 0.0, np.ones(3))
    found = scenes.label(scene)

    x = np.broadcast_to(((np.arange(48) + 0.5) - 24) / FOCAL, (48, 48))
    rays = np.stack([x, x.T, np.ones((48, 48))], -1)  # camera coordinates, depth 1
    c = axes @ (centre - eye)
    a = (rays**2).sum(-1)
    b = rays @ c
    root = b**2 - a * (c @ c - 0.36)
    mask = root > 0
    assert np.array_equal(found.instances == 1, mask)
    depth = (b - np.sqrt(np.where(mask, root, 0))) / a
    assert np.abs(found.depth - depth)[mask].max() < 1e-4
    normals = (depth[..., None] * rays - c) / 0.6
    assert np.abs(found.normals - normals)[mask].max() < 1e-3

    rows, columns = np.nonzero(mask)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert found.boxes[0].tolist() == box
    assert found.areas[0].tolist() == [mask.sum(), mask.sum()]
    assert np.allclose(found.keypoints[0, 0], 24 + FOCAL * c[:2] / c[2])
    assert found.states[0].tolist() == [1] + 8 * [-1]
    assert found.labels.tolist() == [1, 0, 0, 0]

    # A ray falls by (rays @ axes)[2] per unit of depth.
    floor = -2.5 / (rays @ axes)[..., 2]
    seen = ~mask & (floor < scenes.FAR) & (floor > 0)
    assert np.allclose(found.depth[seen], floor[seen])
    assert np.allclose(found.normals[seen], axes @ [0, 0, 1])
    assert seen.sum() + mask.sum() == (found.depth > 0).sum()


def test_scenes_are_drawn_as_described(rendered):
    for _, _, scene in rendered:
        assert np.allclose(scene.axes @ scene.axes.T, np.eye(3))
        assert np.isclose(np.linalg.det(scene.axes), 1) and np.isclose(scene.axes[0, 2], 0)
        used = [scene.floor_texture, *(s.texture for s in scene.solids)]
        assert len(set(used)) == len(used)
        for solid in scene.solids:
            assert np.allclose(solid.turn @ solid.turn.T, np.eye(3))
            assert np.isclose(np.linalg.det(solid.turn), 1)
            points = solid.points[1:]
            assert (points[:, 2] > -1e-9).all()  # lies on the floor
            if scenes.NAMES[solid.shape] in ("box", "octahedron"):
                assert points[:, 2].min() < 1e-9
        for a in scene.solids:
            for b in scene.solids:
                apart = np.linalg.norm(a.centre - b.centre) > a.radius + b.radius
                assert a is b or apart


def test_normals_are_the_slope_of_the_depth(rendered):
    """By rays 1/200 pixel to the right and below, where no edge lies between: on one
    surface, whose normal turns by less than a quarter of a degree."""
    share = []  # of the pixels that are judged
    for _, labels, scene in rendered:
        rays = scenes.pixel_rays(scene.axes, 48)
        valid = labels.depth.ravel() > 0
        points = []  # in camera coordinates
        normals = []
        numbers = []
        for shift in (0, scene.axes[0], scene.axes[1]):
            moved = rays[valid] + 0.005 / FOCAL * np.asarray(shift)
            depths = scenes.trace(scene, moved).clip(max=99)
            way = depths.min(0)[:, None] * moved
            points.append(way @ scene.axes.T)
            numbers.append(depths.argmin(0))
            seen = scenes.surface_normals(scene, scene.eye + way, depths.argmin(0))
            normals.append(seen @ scene.axes.T)
        here, right, below = points
        measured = np.cross(below - here, right - here)
        measured /= scenes.norm(measured)[:, None]

        own = labels.normals.reshape(-1, 3)[valid]
        assert np.allclose(own, normals[0])
        assert np.abs(scenes.norm(own) - 1).max() < 1e-9
        facing = -(own * here).sum(1) / scenes.norm(here)
        assert facing.min() > 0  # none shows its back
        quarter = np.cos(np.deg2rad(0.25))
        smooth = np.ptp(numbers, 0) == 0
        for other in normals[1:]:
            smooth &= (own * other).sum(1) > quarter
        share.append(smooth.mean())
        angle = np.rad2deg(np.arccos((own * measured).sum(1)[smooth].clip(-1, 1)))
        # but two parallel faces of a cross may lie side by side
        assert angle.max() < 1 and np.median(angle) < 0.01
    assert np.mean(share) > 0.98


def test_states_of_keypoints_by_brute_force(rendered):
    """A point is visible if no solid contains any of 2,000 points between it and the eye."""
    checked = 0
    for _, labels, scene in rendered:
        for j, solid in enumerate(scene.solids):
            others = [s for s in scene.solids if s is not solid]
            for k, point in enumerate(solid.points):
                share = np.linspace(0.3, 1, 2000, endpoint=False)[:, None]
                way = scene.eye + share * (point - scene.eye)
                # of the way to a point of its own surface, the last hundredth is not judged
                gaps = [other.distance(way).min() for other in others]
                if k:
                    gaps.append(solid.distance(way[: int(0.985 * 2000)]).min())
                inside = ((labels.keypoints[j, k] >= 0) & (labels.keypoints[j, k] < 48)).all()
                if abs(min(gaps)) > 0.004:
                    assert labels.states[j, k] == int(inside and min(gaps) > 0)
                    checked += 1
    assert checked > 40


def test_shadows_fall_where_the_sun_is_hidden(rendered):
    """At points of the floor, from 300 places on each one's way to the sun: no light if one of them
    is inside a solid, all of it if every solid stays far enough from all of them."""
    dark = 0
    lit = 0
    for _, _, scene in rendered:
        points = np.random.default_rng(0).uniform(-2.5, 2.5, (200, 3)) * [1, 1, 0]
        clear = np.min([s.distance(points) for s in scene.solids], 0) > 0.05
        points = points[clear]
        light = scenes.shadows(scene, points, np.tile(scenes.Z, (len(points), 1)))
        along = np.linspace(0.02, 5, 300)
        way = points[:, None] + 0.02 * scenes.Z + along[:, None] * scene.sun  # (200, 300, 3)
        gap = np.min([s.distance(way) for s in scene.solids], 0)
        hidden = gap.min(1) < -0.01
        free = (8 * gap / along).min(1) > 1.1
        assert (light[hidden] == 0).all() and (light[free] == 1).all()
        dark += hidden.sum()
        lit += free.sum()
    assert dark > 30 and lit > 300


def test_textures_are_mirrored_at_their_edges():
    assert scenes.mirrored(np.arange(-4, 7), 3).tolist() == [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0]
    texture = np.arange(6.0).reshape(2, 3, 1)
    u = np.array([0, 0.5, 0.25, 1.5, -0.5])
    v = np.array([0, 0, 0.25, 0, 0.5])
    expected = [0, 1, 0.5 + 1.5, 2, 3]
    assert scenes.look_up(texture, u, v)[:, 0].tolist() == expected


# -------- Building anew ---------------------------------------------------------------------------


def assert_same_pictures(found, stored, same_encoder):
    """Equal files if the same encoder made them, else equal but for what encoders may differ in."""
    if same_encoder:
        assert np.array_equal(found["webp"], stored["webp"])
    for a, b in zip(decode_webp(found), decode_webp(stored)):
        assert a.shape == b.shape
        assert (a.float() - b.float()).abs().mean() < 3  # grey levels of 255


def assert_rendered_again(photos, split, count):
    """The first scenes of a split. Of training scenes, without a look at the test photographs, and
    the other way round."""
    own = {name: array for name, array in photos.items() if name.startswith(split)}
    found = build.scene_arrays(split, count, own)
    with np.load(SOLIDS) as file:
        assert file["shapes"].tolist() == scenes.NAMES
        same = str(file["encoder"]) == str(build.encoder())
        stored = {name: file[f"{split}_{name}"] for name in found}
    stored["ends"] = stored["ends"][:count]
    stored["webp"] = stored["webp"][: stored["ends"][-1]]
    for name in set(found) - {"webp", "ends"}:
        assert np.array_equal(found[name], stored[name][:count]), name
    assert_same_pictures(found, stored, same)


@EACH_SPLIT
def test_the_first_scenes_are_rendered_again(photos, split):
    assert_rendered_again(photos, split, 2)


@pytest.mark.thorough
@EACH_SPLIT
def test_all_scenes_are_rendered_again(photos, split):
    """A minute for both splits."""
    assert_rendered_again(photos, split, build.SCENES[split])


@pytest.mark.thorough
def test_the_photographs_are_built_again(tmp_path, photos):
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip("needs Debian's package tools")
    try:
        found = build.photos(tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("Debian's packages cannot be downloaded")
    assert set(found) == set(photos)
    same = str(found["encoder"]) == str(photos["encoder"])
    for name in found:
        if name != "encoder" and not name.endswith(("_webp", "_ends")):
            assert np.array_equal(found[name], photos[name]), name
    for split in SPLITS:
        parts = ["webp", "ends"]
        halves = [{part: arrays[f"{split}_{part}"] for part in parts} for arrays in (found, photos)]
        assert_same_pictures(*halves, same)
