"""Pictures of the robots without a graphics library: rays against the collision shapes, in numpy.

Capsules and spheres get soft outlines from the distance between ray and axis; boxes are sampled four times per
pixel. The
ground is a checker of 1 m tiles that fades into the distance, with soft shadows; the camera follows the robot, so the
tiles show how fast it moves. Limbs on the robot's left are warm, those on its right cool, the trunk is grey.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from pwm_fast.envs.dflex.kinematics import link_poses, rotation_matrices
from pwm_fast.envs.dflex.model import BOX, CAPSULE, SPHERE, load_model
from pwm_fast.envs.dflex.tasks import DflexTask, get_task

SUN = np.array([0.30, 0.86, 0.42]) / np.linalg.norm([0.30, 0.86, 0.42])
TOWARDS_CAMERA = np.array([0.38, 0.30, 0.88]) / np.linalg.norm([0.38, 0.30, 0.88])
FIELD_OF_VIEW = 0.60  # rad, vertical
SKY, HORIZON = np.array([0.72, 0.83, 0.93]), np.array([0.94, 0.95, 0.96])
LIGHT_TILE, DARK_TILE = np.array([0.82, 0.83, 0.84]), np.array([0.66, 0.69, 0.72])
TRUNK, LEFT, RIGHT = np.array([0.38, 0.41, 0.47]), np.array([0.93, 0.45, 0.24]), np.array([0.13, 0.58, 0.67])
SHADOW = 0.55  # share of the light that a shadow leaves


@dataclass(frozen=True)
class Body:
    """A robot's shapes: link, kind [n]; size [n, 3]; pose in the link; colour; and the robot's own size and
    mid-height (m)."""

    link: np.ndarray
    kind: np.ndarray
    size: np.ndarray
    position: np.ndarray  # [n, 3]
    rotation: np.ndarray  # [n, 3, 3]
    colour: np.ndarray  # [n, 3]
    extent: float
    height: float


@dataclass(frozen=True)
class Camera:
    """A pinhole at ``eye``; rays [H, W, 3] of unit length, ``axes`` rows right, up, forward; ``focal`` in pixels."""

    eye: np.ndarray
    axes: np.ndarray
    rays: np.ndarray
    focal: float

    def rectangle(self, points: np.ndarray, margin: float) -> tuple[slice, slice] | None:
        """Rows and columns of the picture that hold points [n, 3] with ``margin`` (m) around them; None outside of
        it."""
        local = (points - self.eye) @ self.axes.T
        depth = np.maximum(local[:, 2], 0.05)
        reach = margin * self.focal / depth * 1.05 + 2
        height, width = self.rays.shape[:2]
        column, row = width / 2 + self.focal * local[:, 0] / depth, height / 2 - self.focal * local[:, 1] / depth
        left, right = int(max((column - reach).min(), 0)), int(min((column + reach).max() + 1, width))
        top, bottom = int(max((row - reach).min(), 0)), int(min((row + reach).max() + 1, height))
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


@cache
def _body(model_name: str) -> Body:
    model = load_model(model_name)
    shapes = model.shapes
    position, rotation = shapes.transform[:, :3], rotation_matrices(shapes.transform[:, 3:])
    origin, turn = (x[0] for x in link_poses(model, model.start_q[None]))
    centre = origin[shapes.link] + np.einsum("nij,nj->ni", turn[shapes.link], position)
    side = centre[:, 2] - origin[0, 2]  # the robots start facing +x, their right is +z
    colour = np.where(side[:, None] < -0.02, LEFT, np.where(side[:, None] > 0.02, RIGHT, TRUNK))
    if np.ptp(side) < 0.02:  # Hopper has no sides: trunk, then the leg's parts in turn
        colour = np.stack([(TRUNK, LEFT, RIGHT, LEFT)[i % 4] for i in range(len(centre))])
    reach = np.where(
        (shapes.kind == SPHERE)[:, None], shapes.size[:, :1], np.linalg.norm(shapes.size, axis=-1)[:, None]
    )
    low, high = (centre - reach).min(0), (centre + reach).max(0)
    link, kind, size = shapes.link, shapes.kind, shapes.size
    for i in np.flatnonzero(kind == SPHERE):  # a lone sphere far from its joint (ANYmal's feet): draw the bone between
        length = float(np.linalg.norm(position[i]))
        if (shapes.link == shapes.link[i]).sum() == 1 and length > 2 * size[i, 0]:
            first = position[i] / length
            second = np.cross(first, np.eye(3)[np.abs(first).argmin()])
            second /= np.linalg.norm(second)
            axes = np.stack([first, second, np.cross(first, second)], -1)
            link, kind = np.append(link, link[i]), np.append(kind, CAPSULE)
            size = np.concatenate([size, [[0.7 * size[i, 0], length / 2, 0.0]]])
            position, rotation = (
                np.concatenate([position, position[i][None] / 2]),
                np.concatenate([rotation, axes[None]]),
            )
            colour = np.concatenate([colour, colour[i][None]])
    return Body(
        link=link,
        kind=kind,
        size=size.astype(np.float32),
        position=position,
        rotation=rotation,
        colour=colour.astype(np.float32),
        extent=float(max(1.2 * (high - low)[[0, 2]].max(), (high - low)[1])),  # room for feet close to the camera
        height=float((high + low)[1] / 2),
    )


def _camera(target: np.ndarray, distance: float, width: int, height: int) -> Camera:
    forward = -TOWARDS_CAMERA
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(right, forward), forward])
    focal = height / 2 / np.tan(FIELD_OF_VIEW / 2)
    x = (np.arange(width) + 0.5 - width / 2) / focal
    y = (height / 2 - np.arange(height) - 0.5) / focal
    rays = x[None, :, None] * axes[0] + y[:, None, None] * axes[1] + axes[2]
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    return Camera(target + distance * TOWARDS_CAMERA, axes, rays.astype(np.float32), focal)


def _smooth_step(x: np.ndarray, width: np.ndarray) -> np.ndarray:
    """0 below -width / 2, 1 above width / 2, linear between."""
    return np.clip(x / width + 0.5, 0.0, 1.0)


@dataclass(frozen=True)
class Ground:
    """What stays the same on every picture of a film, relative to the camera's target (which keeps its height)."""

    camera: Camera
    sky: np.ndarray  # [H, W, 3]
    seen: np.ndarray  # [H, W] where the ground is close enough to draw
    depth: np.ndarray  # [H, W] distance along the ray, infinite in the sky
    x: np.ndarray  # [seen] place on the ground
    z: np.ndarray
    blur_x: np.ndarray  # size of a pixel on the ground
    blur_z: np.ndarray
    fog: np.ndarray


@cache
def _ground(height: float, distance: float, width: int, rows: int) -> Ground:
    camera = _camera(np.array([0.0, height, 0.0]), distance, width, rows)
    down = camera.rays[..., 1]
    steepness = np.clip(down / 0.25, 0.0, 1.0)[..., None]
    depth = np.where(down < -1e-4, -camera.eye[1] / np.minimum(down, -1e-4), np.inf).astype(np.float32)
    seen = depth < 60 * distance
    t = depth[seen]
    x, z = (camera.eye[i] + t * camera.rays[..., i][seen] for i in (0, 2))
    blur = np.maximum(t / camera.focal, 1e-3)
    fog = np.clip((np.hypot(x, z) / distance - 0.9) / 5.0, 0.0, 1.0)[:, None]
    columns = (x, z, blur, blur / -down[seen], fog)
    sky = (HORIZON + (SKY - HORIZON) * steepness).astype(np.float32)
    return Ground(camera, sky, seen, depth, *(column.astype(np.float32) for column in columns))


def _background(ground: Ground, target: np.ndarray) -> np.ndarray:
    """Sky and checker [H, W, 3]."""

    def stripes(u, blur):  # +-1 over tiles of 1 m, smoothed over a pixel's footprint, grey when finer than that
        wave = np.abs(u - 2.0 * np.floor(0.5 * u) - 1.0) - 0.5
        return np.clip(wave / blur, -1.0, 1.0) * np.clip(2.0 - 2.0 * blur, 0.0, 1.0)

    offset = np.float32(target[0] % 2.0), np.float32(target[2] % 2.0)
    checker = stripes(ground.x + offset[0], ground.blur_x) * stripes(ground.z + offset[1], ground.blur_z)
    middle, swing = (LIGHT_TILE + DARK_TILE) / 2, (LIGHT_TILE - DARK_TILE) / 2
    tiles = checker[:, None] * swing.astype(np.float32) + middle.astype(np.float32)
    tiles += (HORIZON.astype(np.float32) - tiles) * ground.fog
    picture = ground.sky.copy()
    picture[ground.seen] = tiles
    return picture


def _shade(picture, window, where, normal, rays, colour, alpha) -> None:
    """Blend a lit surface into picture[window][where]; normal, rays [n, 3], alpha [n]."""
    diffuse = np.clip(normal @ SUN, 0.0, None)
    sky = 0.5 + 0.5 * normal[:, 1]
    half = SUN - rays
    half /= np.linalg.norm(half, axis=-1, keepdims=True)
    gloss = np.clip((normal * half).sum(-1), 0.0, 1.0) ** 32
    lit = colour * (0.32 + 0.28 * sky + 0.62 * diffuse)[:, None] + 0.22 * gloss[:, None]
    target = picture[window]
    target[where] += (np.clip(lit, 0.0, 1.0) - target[where]) * alpha[:, None]


def _draw_capsule(picture, depth, camera, a, b, radius, colour) -> None:
    """A capsule from a to b (a sphere if they coincide): exact hit, outline softened over one pixel."""
    window = camera.rectangle(np.stack([a, b]), radius)
    if window is None:
        return
    rays = camera.rays[window]
    centre_depth = max(float(np.linalg.norm((a + b) / 2 - camera.eye)), 0.1)
    pixel = centre_depth / camera.focal
    grown = radius + 0.5 * pixel  # reach the half-covered pixels at the outline too
    axis, start, end = b - a, camera.eye - a, camera.eye - b
    length2 = float(axis @ axis)

    def sphere(offset):
        along = rays @ offset.astype(np.float32)
        miss2 = float(offset @ offset) - along**2  # squared distance of the ray from the centre
        return -along - np.sqrt(np.maximum(grown**2 - miss2, 0.0)), miss2

    t, miss2 = sphere(start)
    height = np.zeros_like(t)  # position of the hit's centre on the axis, 0..1
    if length2 > 1e-10:
        t_end, miss2_end = sphere(end)
        ray_axis, ray_start = rays @ axis.astype(np.float32), rays @ start.astype(np.float32)
        axis_start = float(axis @ start)
        qa = np.maximum(length2 - ray_axis**2, 1e-9)
        qb = length2 * ray_start - axis_start * ray_axis
        qc = length2 * float(start @ start) - axis_start**2 - grown**2 * length2
        discriminant = qb**2 - qa * qc
        t_side = (-qb - np.sqrt(np.maximum(discriminant, 0.0))) / qa
        y = (axis_start + t_side * ray_axis) / length2
        side = (discriminant > 0) & (y > 0) & (y < 1)
        nearer_end = np.where(miss2 < grown**2, np.where(miss2_end < grown**2, t_end < t, False), True)
        t = np.where(side, t_side, np.where(nearer_end, t_end, t))
        height = np.where(side, y, np.where(nearer_end, 1.0, 0.0))
        miss2 = np.where(side, grown**2 - discriminant / (qa * length2), np.where(nearer_end, miss2_end, miss2))
    alpha = _smooth_step(radius - np.sqrt(np.maximum(miss2, 0.0)), pixel) * (miss2 < grown**2)
    where = (alpha > 0) & (t > 0.05) & (t < depth[window])
    if not where.any():
        return
    t, alpha, rays = t[where], alpha[where], rays[where]
    normal = camera.eye + t[:, None] * rays - (a + height[where][:, None] * axis)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    _shade(picture, window, where, normal, rays, colour, alpha)
    solid = depth[window]
    solid[where] = np.where(alpha > 0.5, t, solid[where])


def _draw_box(picture, depth, camera, centre, rotation, half, colour) -> None:
    """A box by slabs; the outline is the share of four samples per pixel that hit."""
    window = camera.rectangle(centre[None], float(np.linalg.norm(half)))
    if window is None:
        return
    rays = camera.rays[window]
    origin = rotation.T @ (camera.eye - centre)
    pixel = 1.0 / camera.focal
    alpha = np.zeros(rays.shape[:2], np.float32)
    for dx, dy in ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)):
        direction = (rays + (dx * camera.axes[0] + dy * camera.axes[1]).astype(np.float32) * pixel) @ rotation
        inverse = 1.0 / np.where(np.abs(direction) < 1e-6, 1e-6, direction)
        near, far = -origin * inverse - half * np.abs(inverse), -origin * inverse + half * np.abs(inverse)
        hit = near.max(-1) < far.min(-1)
        alpha += 0.25 * hit
    t, face = near.max(-1), near.argmax(-1)
    t = np.where(hit, t, np.linalg.norm(origin))  # partly covered pixels that the last sample misses
    where = (alpha > 0) & (t > 0.05) & (t < depth[window])
    if not where.any():
        return
    face, rays = face[where], rays[where]
    sign = -np.sign(np.take_along_axis(direction[where], face[:, None], -1))
    _shade(picture, window, where, rotation.T[face] * sign, rays, colour, alpha[where])
    solid = depth[window]
    solid[where] = np.where(alpha[where] > 0.5, t[where], solid[where])


def _cast_shadow(light, camera, ground, a, b, radius) -> None:
    """Darken light [H, W] where the capsule from a to b keeps the sun from the ground; softer the higher it is."""
    fall = SUN / SUN[1]
    feet = np.stack([a - fall * a[1], b - fall * b[1]])
    window = camera.rectangle(feet, 2.5 * radius + 0.1)
    if window is None:
        return
    t = ground[window]
    visible = np.isfinite(t)
    point = camera.eye + np.where(visible, t, 0.0)[..., None] * camera.rays[window]
    # distance to the axis, seen along the sun's direction
    u = np.cross(SUN, [1.0, 0.0, 0.0])
    plane = np.stack([u / np.linalg.norm(u), np.cross(SUN, u / np.linalg.norm(u))]).astype(np.float32)
    offset, axis = (point - a).astype(np.float32) @ plane.T, plane @ (b - a)
    along = np.clip(offset @ axis / max(float(axis @ axis), 1e-9), 0.0, 1.0)
    distance = np.linalg.norm(offset - along[..., None] * axis, axis=-1)
    softness = 0.03 + 0.10 * np.maximum(a[1] + along * (b[1] - a[1]), 0.0)
    shade = _smooth_step(radius - distance, softness) * visible
    light[window] = np.minimum(light[window], 1.0 - (1.0 - SHADOW) * shade)


def _frame(body: Body, position: np.ndarray, rotation: np.ndarray, target: np.ndarray, width: int, height: int):
    """One picture float [H, W, 3] of shapes at position [n, 3], rotation [n, 3, 3], all moved to the target's
    origin."""
    distance = body.extent * (0.95 / (2 * np.tan(FIELD_OF_VIEW / 2)) + 0.5)
    ground = _ground(body.height, distance, width, height)
    camera, picture = ground.camera, _background(ground, target)
    position = position - [target[0], 0.0, target[2]]
    half = np.where(body.kind == SPHERE, 0.0, body.size[:, 1])[:, None] * rotation[:, :, 0]  # a capsule's axis is its x
    light = np.ones(ground.depth.shape, np.float32)
    for i, kind in enumerate(body.kind):
        if kind == BOX:  # the shadow of the box's longest middle line
            longest = int(body.size[i].argmax())
            radius = float(np.delete(body.size[i], longest).mean())
            arm = rotation[i][:, longest] * max(float(body.size[i][longest]) - radius, 0.0)
            _cast_shadow(light, camera, ground.depth, position[i] - arm, position[i] + arm, radius)
        else:
            a, b = position[i] - half[i], position[i] + half[i]
            _cast_shadow(light, camera, ground.depth, a, b, float(body.size[i, 0]))
    picture *= light[..., None]
    depth = ground.depth.copy()
    for i in np.argsort(-np.linalg.norm(position - camera.eye, axis=-1)):  # far to near, so that outlines blend
        if body.kind[i] == BOX:
            _draw_box(picture, depth, camera, position[i], rotation[i], body.size[i], body.colour[i])
        else:
            a, b = position[i] - half[i], position[i] + half[i]
            _draw_capsule(picture, depth, camera, a, b, float(body.size[i, 0]), body.colour[i])
    return picture


def render(task: str | DflexTask, joint_q: np.ndarray, width: int = 400, height: int = 300) -> np.ndarray:
    """joint_q [nq] -> picture uint8 [height, width, 3]; joint_q [T, nq] -> a film [T, height, width, 3].

    Raises UnknownTask, and ValueError for a wrong number of coordinates, non-finite ones or an empty picture.
    """
    row = get_task(task)
    model, body = load_model(row.model), _body(row.model)
    joint_q = np.asarray(joint_q, np.float64)
    if joint_q.ndim not in (1, 2) or joint_q.shape[-1] != model.nq:
        raise ValueError(f"joint_q must be [{model.nq}] or [T, {model.nq}] for {row.name}, got {list(joint_q.shape)}")
    if not np.isfinite(joint_q).all():
        raise ValueError("joint_q holds non-finite numbers")
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be >= 1, got {width} x {height}")
    origin, turn = link_poses(model, np.atleast_2d(joint_q))
    position = origin[:, body.link] + np.einsum("tnij,nj->tni", turn[:, body.link], body.position)
    rotation = turn[:, body.link] @ body.rotation
    root = origin[:, np.flatnonzero(model.mass > 0)[0]]
    film = np.empty((len(root), height, width, 3), np.uint8)
    for t in range(len(root)):
        target = np.array([root[t, 0], body.height, root[t, 2]])
        picture = _frame(body, position[t], rotation[t], target, width, height)
        film[t] = (np.clip(picture, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return film[0] if joint_q.ndim == 1 else film
