"""Renders scenes of textured solids with exact labels: solids.npz is made of them (build.py).

How a scene is made (scene(...) below, from top to bottom):

    1. draw_scene   two to four solids are laid on a floor, in random sizes and turns and without
                    touching each other; a camera looks at them, a sun shines
    2. trace        one ray through the centre of each pixel finds the first surface: all labels
    3. shade        four rays per pixel find colours: textures (photographs), sun, soft shadow
    4. keypoints    a ray to each corner or tip finds out whether something hides it

A scene in which an object is nearly hidden is drawn anew: every object shows at least MIN_PIXELS
pixels, and at least MIN_SHARE of those that it would show if it stood alone.

A solid is the set where its signed distance function f (`distance` below) is not positive. Outside,
f never exceeds the true distance to the surface, so a ray may advance by f without missing anything
(sphere tracing: Hart 1996, https://doi.org/10.1007/s003710050084). The normal is the gradient of f.
Distance functions and soft shadows of this kind are explained at https://iquilezles.org/articles/.

Coordinates. World: z up, the floor is z = 0. Camera: x right, y down, z forward; the point
(X, Y, Z) is seen at x = SIZE / 2 + FOCAL X / Z, y = SIZE / 2 + FOCAL Y / Z, in pixels. Pixel (i, j)
covers [j, j + 1) x [i, i + 1). A solid's own coordinates q: world = centre + scale * turn @ q.
"""

import io
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = 48  # pixels, both sides of a picture
FOCAL = SIZE / 2 / 0.45  # pixels; the picture spans 48 degrees
FAR = 12.0  # the floor ends at this depth
OBJECTS = 4  # at most, per scene
POINTS = 9  # at most, per object: its centre, and eight corners or tips
MIN_PIXELS = 30  # of an object, visible
MIN_SHARE = 0.4  # of the pixels an object would have if nothing stood before it
TEXTURE_SIDE = 48  # pixels, the shorter side of a texture; more would flicker from pixel to pixel
SUBPIXELS = 2  # rays per pixel and axis from which its colour is averaged


# -------- Solids ----------------------------------------------------------------------------------


def norm(v):
    return np.sqrt((v * v).sum(-1))


def box_distance(q, half):
    """Distance to the box |q| <= half, of every point q (..., 3)."""
    outside = np.abs(q) - half
    return norm(np.maximum(outside, 0)) + np.minimum(outside.max(-1), 0)


def around_z(q):
    """Distance of the points q (..., 3) from the z axis."""
    return np.hypot(q[..., 0], q[..., 1])


HALF = np.array([0.72, 0.52, 0.42])  # of the box


def sphere(q):
    return norm(q) - 0.75


def box(q):
    return box_distance(q, HALF)


def cylinder(q):
    return np.maximum(around_z(q) - 0.5, np.abs(q[..., 2]) - 0.7)


def cone(q):
    """The tip at z = 0.8, a base of radius 0.6 at z = -0.6."""
    slope = (1.4 * around_z(q) + 0.6 * (q[..., 2] - 0.8)) / np.hypot(1.4, 0.6)
    return np.maximum(slope, -0.6 - q[..., 2])


def torus(q):
    return np.hypot(around_z(q) - 0.6, q[..., 2]) - 0.22


def capsule(q):
    beyond = np.maximum(np.abs(q[..., 2]) - 0.5, 0)  # the axis is the segment |z| <= 0.5
    return np.hypot(around_z(q), beyond) - 0.35


def octahedron(q):
    return (np.abs(q).sum(-1) - 0.95) / np.sqrt(3)


def cross(q):
    """Three bars, along the three axes."""
    bars = np.full((3, 3), 0.24) + np.diag([0.61, 0.61, 0.61])
    return np.minimum.reduce([box_distance(q, half) for half in bars])


def both_ways(points):
    points = np.asarray(points)
    return np.concatenate([points, -points])


class Shape(NamedTuple):
    """distance: (..., 3) points -> (...) f. reach: unit direction d (3,) -> the largest d . q of
    the solid, which tells how high it lies on the floor. radius: of a sphere around it. points:
    (k, 3), its corners or tips."""

    distance: callable
    reach: callable
    radius: float
    points: np.ndarray


NO_POINTS = np.zeros((0, 3))
Z = np.array([0.0, 0, 1])
CORNERS = HALF * (1 - 2 * np.array(list(np.ndindex(2, 2, 2))))
SHAPES = {
    "sphere": Shape(sphere, lambda d: 0.75, 0.75, NO_POINTS),
    "box": Shape(box, lambda d: HALF @ np.abs(d), norm(HALF), CORNERS),
    "cylinder": Shape(
        cylinder,
        lambda d: 0.5 * around_z(d) + 0.7 * abs(d[2]),
        np.hypot(0.5, 0.7),
        both_ways([0.7 * Z]),
    ),
    "cone": Shape(
        cone,
        lambda d: max(0.8 * d[2], 0.6 * around_z(d) - 0.6 * d[2]),
        np.hypot(0.6, 0.6),
        np.array([0.8 * Z]),
    ),
    "torus": Shape(torus, lambda d: 0.6 * around_z(d) + 0.22, 0.82, NO_POINTS),
    "capsule": Shape(
        capsule, lambda d: 0.5 * abs(d[2]) + 0.35, 0.85, both_ways([0.85 * Z])
    ),
    "octahedron": Shape(
        octahedron, lambda d: 0.95 * np.abs(d).max(), 0.95, both_ways(0.95 * np.eye(3))
    ),
    "cross": Shape(
        cross,
        lambda d: 0.24 * np.abs(d).sum() + 0.61 * np.abs(d).max(),
        norm(np.array([0.85, 0.24, 0.24])),
        both_ways(0.85 * np.eye(3)),
    ),
}
NAMES = list(SHAPES)


class Solid(NamedTuple):
    shape: int  # row of NAMES
    scale: float
    turn: np.ndarray  # (3, 3), a rotation
    centre: np.ndarray  # (3,) in the world
    texture: int
    shift: np.ndarray  # (2,) of the texture
    tint: np.ndarray  # (3,) a colour that is mixed into the texture

    def own(self, points):
        """World points (..., 3) in the solid's own coordinates."""
        return (points - self.centre) @ self.turn / self.scale

    def distance(self, points):
        """The signed distance function in the world: (..., 3) -> (...)."""
        return self.scale * SHAPES[NAMES[self.shape]].distance(self.own(points))

    @property
    def radius(self):
        return self.scale * SHAPES[NAMES[self.shape]].radius

    @property
    def points(self):
        """(1 + k, 3): the centre, then corners or tips, in the world."""
        own = SHAPES[NAMES[self.shape]].points
        return np.concatenate([self.centre[None], self.centre + self.scale * own @ self.turn.T])


# -------- A scene ---------------------------------------------------------------------------------


class Scene(NamedTuple):
    solids: list
    eye: np.ndarray  # (3,) the camera's place
    axes: np.ndarray  # (3, 3) rows: right, down, forward
    sun: np.ndarray  # (3,) unit vector towards the sun
    floor_texture: int
    floor_turn: float
    sky: np.ndarray  # (3,) colour


def direction(azimuth, elevation):
    flat = np.cos(elevation)
    return np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)])


def random_turn(rng):
    """A rotation, uniformly distributed: the matrix of a random unit quaternion."""
    quaternion = rng.normal(size=4)
    w, x, y, z = quaternion / norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def draw_solid(rng, shape, texture):
    """A solid that lies on the floor: its lowest point has z = 0."""
    scale = rng.uniform(0.6, 0.95)
    turn = random_turn(rng)
    place = 1.3 * np.sqrt(rng.uniform()) * direction(rng.uniform(0, 2 * np.pi), 0)
    height = scale * SHAPES[NAMES[shape]].reach(-turn[2])  # of the centre above the floor
    shift = rng.uniform(size=2)
    tint = rng.uniform(size=3)
    return Solid(shape, scale, turn, place + height * Z, texture, shift, tint)


def apart(solids):
    """Whether no two of the spheres around them meet."""
    pairs = itertools.combinations(solids, 2)
    return all(norm(a.centre - b.centre) > a.radius + b.radius for a, b in pairs)


def draw_scene(rng, shapes, textures):
    """Solids of these shapes (rows of NAMES) that do not touch, seen by a random camera. textures:
    how many there are; no two surfaces have the same one."""
    floor_texture, *used = rng.choice(textures, 1 + len(shapes), replace=False)
    solids = [draw_solid(rng, shape, texture) for shape, texture in zip(shapes, used)]
    while not apart(solids):
        solids = [draw_solid(rng, shape, texture) for shape, texture in zip(shapes, used)]

    # The camera looks, without rolling, at a point near the middle.
    target = np.array([*rng.uniform(-0.2, 0.2, 2), 0.35])
    towards = direction(rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.8))
    eye = target + rng.uniform(3.6, 4.6) * towards
    right = np.cross(-towards, Z)
    right /= norm(right)
    axes = np.stack([right, np.cross(-towards, right), -towards])

    sun = direction(rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.2))
    sky = np.array([0.6, 0.75, 0.9]) * rng.uniform(0.8, 1.1)
    return Scene(solids, eye, axes, sun, floor_texture, rng.uniform(0, 2 * np.pi), sky)


# -------- Rays ------------------------------------------------------------------------------------


def pixel_rays(axes, size):
    """Rays through the centres of size x size pixels: (size * size, 3) world vectors whose depth is
    1, row by row."""
    centres = (np.arange(size) + 0.5) / size * 2 - 1  # -1 ... 1
    x, y = np.meshgrid(centres, centres)
    slope = SIZE / 2 / FOCAL
    own = np.stack([slope * x, slope * y, np.ones_like(x)], -1).reshape(-1, 3)
    return own @ axes


def through_sphere(solid, origins, rays, margin=0.0):
    """The part of each ray within a sphere around the solid: (R,) bool whether there is any, and
    (R,) lengths where it begins and ends. rays: (R, 3) unit vectors."""
    start = origins - solid.centre
    along = (start * rays).sum(-1)
    inside = along**2 - (start * start).sum(-1) + (solid.radius + margin) ** 2
    half = np.sqrt(np.maximum(inside, 0))
    first = np.maximum(-along - half, 0)
    last = -along + half
    return (inside > 0) & (last > 0), first, last


def trace_solid(solid, origin, rays):
    """(R,) length at which each ray meets the solid, infinite where it does not. rays: (R, 3) unit
    vectors from `origin`, which lies outside."""
    near, length, last = through_sphere(solid, origin, rays)
    met = np.full(len(rays), np.inf)
    active = np.flatnonzero(near)
    while len(active):
        gap = solid.distance(origin + length[active, None] * rays[active])
        length[active] += gap
        arrived = gap < 1e-6
        met[active[arrived]] = length[active[arrived]]
        active = active[~arrived & (length[active] < last[active])]
    return met


def trace(scene, rays):
    """Depths (1 + n, R) at which each ray meets the floor and each of the n solids; infinite where
    it does not. rays: (R, 3), of depth 1."""
    with np.errstate(divide="ignore"):
        floor = np.where(rays[:, 2] < 0, -scene.eye[2] / rays[:, 2], np.inf)
    floor[floor > FAR] = np.inf
    length = norm(rays)
    unit = rays / length[:, None]
    return np.stack([floor, *(trace_solid(s, scene.eye, unit) / length for s in scene.solids)])


def surface_normals(scene, points, seen):
    """Unit normals (R, 3) in the world: the gradient of the distance function, by differences.
    seen: (R,) 0 where the point lies on the floor, j where it lies on solid j - 1."""
    normals = np.tile(Z, (len(points), 1))
    step = 1e-6 * np.eye(3)
    for number, solid in enumerate(scene.solids, 1):
        own = seen == number
        around = points[own, None]
        gradient = solid.distance(around + step) - solid.distance(around - step)  # (r, 3)
        normals[own] = gradient / norm(gradient)[:, None]
    return normals


# -------- Colours ---------------------------------------------------------------------------------


def textures(photos, split):
    """The photographs of one split as textures: a list of (h, w, 3) arrays, 0 to 1, whose shorter
    side has TEXTURE_SIDE pixels. photos: the arrays of photos.npz."""
    data = photos[f"{split}_webp"].tobytes()
    ends = photos[f"{split}_ends"].tolist()
    found = []
    for start, end in zip([0, *ends], ends):
        picture = Image.open(io.BytesIO(data[start:end])).convert("RGB")
        factor = TEXTURE_SIDE / min(picture.size)
        size = round(factor * picture.width), round(factor * picture.height)
        found.append(np.asarray(picture.resize(size, Image.Resampling.BOX)) / 255)
    return found


def look_up(texture, u, v):
    """Colours (R, 3) of a texture (h, w, 3) that is mirrored at its edges; u, v = 1 is its shorter
    side. Linear between pixels."""
    height, width = texture.shape[:2]
    y = v * min(height, width)
    x = u * min(height, width)
    top = np.floor(y).astype(int)
    left = np.floor(x).astype(int)
    below = (y - top)[:, None]  # weight of the lower pixels
    beside = (x - left)[:, None]  # weight of the right pixels

    def pixel(i, j):
        return texture[mirrored(i, height), mirrored(j, width)]

    upper = (1 - beside) * pixel(top, left) + beside * pixel(top, left + 1)
    lower = (1 - beside) * pixel(top + 1, left) + beside * pixel(top + 1, left + 1)
    return (1 - below) * upper + below * lower


def mirrored(index, count):
    """Any integers -> 0 ... count - 1, forwards and backwards in turn: ..., 1, 0, 0, 1, ..., count
    - 1, count - 1, ..."""
    index = index % (2 * count)
    return np.minimum(index, 2 * count - 1 - index)


def albedo(scene, textures, points, normals, seen):
    """Colours (R, 3) of the surfaces, in light that is even everywhere."""
    cos = np.cos(scene.floor_turn)
    sin = np.sin(scene.floor_turn)
    x = points[:, 0]
    y = points[:, 1]
    u = (cos * x - sin * y) / 3  # a photograph covers 3 units of the floor
    v = (sin * x + cos * y) / 3
    colours = look_up(textures[scene.floor_texture], u, v)

    # On a solid it is projected along one of the solid's axes: the one that the surface faces most.
    for number, solid in enumerate(scene.solids, 1):
        own = seen == number
        q = solid.own(points[own])
        side = np.abs(normals[own] @ solid.turn).argmax(1)
        u = np.choose(side, [q[:, 1], q[:, 0], q[:, 0]]) / 2 + solid.shift[0]
        v = np.choose(side, [q[:, 2], q[:, 2], q[:, 1]]) / 2 + solid.shift[1]
        photo = look_up(textures[solid.texture], u, v)
        colours[own] = 0.7 * photo + 0.3 * solid.tint
    return colours


def shadows(scene, points, normals, sharpness=8.0):
    """(R,) share of the sun's light that reaches each point. A ray towards the sun that passes a
    solid in the distance h after a length l gets sharpness * h / l of it."""
    light = np.ones(len(points))
    starts = points + 0.02 * normals
    for solid in scene.solids:
        near, length, last = through_sphere(solid, starts, scene.sun, margin=0.3)
        active = np.flatnonzero(near)
        length = np.maximum(length, 0.02)
        while len(active):
            so_far = length[active]
            gap = solid.distance(starts[active] + so_far[:, None] * scene.sun)
            gap = np.maximum(gap, 0)
            light[active] = np.minimum(light[active], sharpness * gap / so_far)
            length[active] += np.maximum(gap, 0.02)
            active = active[(length[active] < last[active]) & (light[active] > 0)]
    return light


def shade(scene, textures):
    """The picture: (SIZE, SIZE, 3) uint8."""
    size = SUBPIXELS * SIZE
    rays = pixel_rays(scene.axes, size)
    depths = trace(scene, rays)
    seen = depths.argmin(0)
    depth = depths.min(0)
    colours = np.tile(scene.sky, (size * size, 1))

    hit = np.flatnonzero(depth < np.inf)
    points = scene.eye + depth[hit, None] * rays[hit]
    normals = surface_normals(scene, points, seen[hit])
    sunlight = np.maximum(normals @ scene.sun, 0) * shadows(scene, points, normals)
    light = 0.35 + 0.1 * normals[:, 2] + 0.75 * sunlight
    lit = albedo(scene, textures, points, normals, seen[hit]) * light[:, None]

    # The floor fades into the sky.
    haze = np.clip((depth[hit, None] - FAR / 2) / (FAR / 2), 0, 1)
    colours[hit] = lit + haze * (scene.sky - lit)

    shape = SIZE, SUBPIXELS, SIZE, SUBPIXELS, 3
    return np.rint(255 * np.clip(colours, 0, 1).reshape(shape).mean((1, 3))).astype(np.uint8)


# -------- Labels ----------------------------------------------------------------------------------


class Labels(NamedTuple):
    instances: np.ndarray  # (SIZE, SIZE) uint8: 0 background, j + 1 object j
    depth: np.ndarray  # (SIZE, SIZE) float64, 0: sky
    normals: np.ndarray  # (SIZE, SIZE, 3) float64 in camera coordinates, 0: sky
    labels: np.ndarray  # (OBJECTS,) uint8: 1 + row of NAMES, 0: no object
    boxes: np.ndarray  # (OBJECTS, 4) uint8: x0, y0, x1, y1, half-open
    areas: np.ndarray  # (OBJECTS, 2) uint16: pixels visible, and if nothing stood before it
    keypoints: np.ndarray  # (OBJECTS, POINTS, 2) float64: x, y in pixels
    states: np.ndarray  # (OBJECTS, POINTS) int8: 1 visible, 0 not, -1 no such point


def extent(mask):
    """The box (x0, y0, x1, y1) around the pixels of a mask, half-open."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def keypoints(scene, number):
    """Where the points of solid `number` are seen, (k, 2), and their states, (k,)."""
    rays = scene.solids[number].points - scene.eye
    own = rays @ scene.axes.T
    places = SIZE / 2 + FOCAL * own[:, :2] / own[:, 2:]
    rays = rays / own[:, 2:]

    # A point of the surface is hidden by what its ray meets before it. The centre lies inside the
    # solid, so what hides it is only another one.
    depths = trace(scene, rays)
    depths[1 + number, 0] = np.inf
    free = depths.min(0) > own[:, 2] - 0.02
    inside = ((places >= 0) & (places < SIZE)).all(1)
    return places, (free & inside).astype(np.int8)


def label(scene):
    """The Labels of a scene, or None if an object is nearly hidden."""
    rays = pixel_rays(scene.axes, SIZE)
    depths = trace(scene, rays)
    depth = depths.min(0)
    hit = depth < np.inf
    seen = np.where(hit, depths.argmin(0), 0)
    visible = np.array([(seen == j + 1).sum() for j in range(len(scene.solids))])
    whole = (depths[1:] < np.inf).sum(1)
    if (visible < np.maximum(MIN_PIXELS, MIN_SHARE * whole)).any():
        return None

    normals = np.zeros((len(rays), 3))
    points = scene.eye + depth[hit, None] * rays[hit]
    normals[hit] = surface_normals(scene, points, seen[hit]) @ scene.axes.T
    out = Labels(
        instances=seen.reshape(SIZE, SIZE).astype(np.uint8),
        depth=np.where(hit, depth, 0).reshape(SIZE, SIZE),
        normals=normals.reshape(SIZE, SIZE, 3),
        labels=np.zeros(OBJECTS, np.uint8),
        boxes=np.zeros((OBJECTS, 4), np.uint8),
        areas=np.zeros((OBJECTS, 2), np.uint16),
        keypoints=np.zeros((OBJECTS, POINTS, 2)),
        states=np.full((OBJECTS, POINTS), -1, np.int8),
    )
    for j, solid in enumerate(scene.solids):
        places, states = keypoints(scene, j)
        out.labels[j] = 1 + solid.shape
        out.boxes[j] = extent(out.instances == j + 1)
        out.areas[j] = visible[j], whole[j]
        out.keypoints[j, : len(places)] = places
        out.states[j, : len(places)] = states
    return out


def render(seed, textures):
    """One scene: (SIZE, SIZE, 3) uint8 picture, Labels, Scene. seed: an int or a sequence of ints;
    equal seeds give equal scenes. textures: list of (h, w, 3) float arrays, 0 to 1."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(len(NAMES), size=rng.integers(2, OBJECTS + 1))
    while True:
        scene = draw_scene(rng, shapes, len(textures))
        labels = label(scene)
        if labels:
            return shade(scene, textures), labels, scene
