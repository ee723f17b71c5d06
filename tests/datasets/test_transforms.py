"""Loading, augmentation and validation images against Pillow and torchvision."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from mmengine.config import Config
from mmengine.dataset import Compose, default_collate
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS, TRANSFORMS
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as tv

from mmvil.datasets.transforms import LoadCheckedImage, check_finite

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / 'configs/vil/vil-tiny_8xb256-800e_in1k-192px.py'
FINETUNE = ROOT / 'configs/vil/vil-tiny_8xb128-20e_in1k-224px.py'
BLUR = ImageFilter.GaussianBlur
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope='module', autouse=True)
def _scope():
    init_default_scope('mmpretrain')


@pytest.fixture
def config() -> Config:
    return Config.fromfile(PRETRAIN)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Make an image with structure at several scales and three unlike channels."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (3 + 5 * c) + c) * np.cos(y / (7 + 2 * c)) for c in range(3)]
    values = 127 + 90 * np.stack(waves, -1) + generator.normal(0, 20, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def as_bgr(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[..., ::-1].copy()


def as_rgb(array: np.ndarray) -> np.ndarray:
    return array[..., ::-1]


def three_augment(config: Config) -> dict:
    return next(step for step in config.train_pipeline if step['type'] == 'RandomChoice')


class TestLoading:
    """LoadCheckedImage."""

    def test_bgr_pixels_of_the_file(self, tmp_path):
        picture(40, 30).save(tmp_path / 'a.png')
        results = LoadCheckedImage()({'img_path': str(tmp_path / 'a.png')})
        assert results['img'].dtype == np.uint8
        assert results['img_shape'] == results['ori_shape'] == (30, 40)
        np.testing.assert_array_equal(results['img'], as_bgr(picture(40, 30)))

    def test_orientation_tag_is_ignored_by_default(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # rotated by 90 degrees
        picture(40, 30).save(tmp_path / 'a.jpg', exif=exif)
        path = str(tmp_path / 'a.jpg')
        assert LoadCheckedImage()({'img_path': path})['img'].shape == (30, 40, 3)
        assert LoadCheckedImage(color_type='color')({'img_path': path})['img'].shape == (40, 30, 3)

    def test_to_float32(self, tmp_path):
        picture(8, 8).save(tmp_path / 'a.png')
        loaded = LoadCheckedImage(to_float32=True)({'img_path': str(tmp_path / 'a.png')})
        assert loaded['img'].dtype == np.float32

    @pytest.mark.parametrize('mode', ['L', 'RGBA', 'CMYK', 'P'])
    def test_other_modes_become_colour(self, tmp_path, mode):
        path = tmp_path / ('a.jpg' if mode == 'CMYK' else 'a.png')
        picture(20, 10).convert(mode).save(path)
        loaded = LoadCheckedImage()({'img_path': str(path)})['img']
        with Image.open(path) as image:
            np.testing.assert_array_equal(loaded, as_bgr(image.convert('RGB')))

    def test_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r'image file .*nowhere\.jpg does not exist'):
            LoadCheckedImage()({'img_path': str(tmp_path / 'nowhere.jpg')})

    @pytest.mark.parametrize('backend', ['pillow', 'cv2'])
    @pytest.mark.parametrize('content', [b'', b'not an image at all', b'\xff\xd8\xff\xe0broken'])
    def test_damaged_file_is_named(self, tmp_path, content, backend):
        (tmp_path / 'bad.jpg').write_bytes(content)
        with pytest.raises(ValueError, match=r'cannot decode image .*bad\.jpg'):
            LoadCheckedImage(imdecode_backend=backend)({'img_path': str(tmp_path / 'bad.jpg')})

    @pytest.mark.parametrize('suffix', ['jpg', 'png'])
    def test_truncated_file_is_named(self, tmp_path, suffix):
        whole = tmp_path / f'whole.{suffix}'
        picture(64, 64).save(whole)
        (tmp_path / f'cut.{suffix}').write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf'cannot decode image .*cut\.{suffix}'):
            LoadCheckedImage()({'img_path': str(tmp_path / f'cut.{suffix}')})

    def test_float_tiff_needs_another_decoder(self, tmp_path):
        values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
        Image.fromarray(values).save(tmp_path / 'a.tif')
        path = str(tmp_path / 'a.tif')
        with pytest.raises(ValueError, match=r'a\.tif.*floating-point TIFF'):
            LoadCheckedImage()({'img_path': path})
        loader = LoadCheckedImage(imdecode_backend='cv2', color_type='unchanged')
        np.testing.assert_array_equal(loader({'img_path': path})['img'], values)
        values[3, 3] = np.nan
        Image.fromarray(values).save(tmp_path / 'a.tif')
        with pytest.raises(ValueError, match=r'a\.tif holds 1 NaN or infinite values among 64'):
            loader({'img_path': path})

    @pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
    def test_array_that_is_not_finite(self, value):
        image = np.zeros((4, 4, 3), np.float32)
        image[1, 2, 0] = value
        with pytest.raises(ValueError, match=r'image x\.npy holds 1 NaN or infinite'):
            LoadCheckedImage()({'img': image, 'img_path': 'x.npy'})
        with pytest.raises(ValueError, match='given as an array'):
            LoadCheckedImage()({'img': image})

    def test_given_array_passes(self):
        image = np.ones((4, 6, 3), np.float32)
        results = LoadCheckedImage()({'img': image})
        assert results['img'] is image
        assert results['img_shape'] == (4, 6)
        check_finite(np.ones((2, 2), np.int64), 'integers')


class TestValidation:
    """Resize of the shorter edge, centre crop, normalisation."""

    @pytest.mark.parametrize('suffix', ['jpg', 'png'])
    @pytest.mark.parametrize('size', [(500, 375), (333, 500), (224, 224), (97, 130), (1201, 225), (640, 641)])
    @pytest.mark.parametrize('path', [PRETRAIN, FINETUNE], ids=['192', '224'])
    def test_equals_torchvision(self, tmp_path, path, size, suffix):
        config = Config.fromfile(path)
        file = tmp_path / f'a.{suffix}'
        picture(*size).save(file)
        sample = Compose([TRANSFORMS.build(step) for step in config.test_pipeline])(
            {'img_path': str(file), 'gt_label': 3}
        )
        resolution = 192 if path == PRETRAIN else 224
        bicubic = tv.InterpolationMode.BICUBIC
        reference = tv.Compose([tv.Resize(resolution, bicubic), tv.CenterCrop(resolution), tv.PILToTensor()])
        with Image.open(file) as image:
            expected = reference(image.convert('RGB'))
        assert torch.equal(sample['inputs'].flip(0), expected)

        preprocessor = MODELS.build({'type': 'ClsDataPreprocessor', **config.data_preprocessor})
        normalised = preprocessor(default_collate([sample]))['inputs'][0]
        torch.testing.assert_close(normalised, tv.Normalize(MEAN, STD)(expected / 255), rtol=0, atol=2e-6)

    def test_crop_ratio_is_one(self, config):
        resize, crop = config.test_pipeline[1:3]
        assert resize.scale == crop.crop_size == 192
        assert config.test_pipeline == config.test_dataloader.dataset.pipeline == config.val_dataloader.dataset.pipeline


class TestThreeAugment:
    """Exactly one of grey-scale, solarisation and blur, always."""

    def candidates(self, image: Image.Image) -> dict[str, np.ndarray]:
        return {
            'grey': np.asarray(image.convert('L').convert('RGB')),
            'solarised': np.asarray(ImageOps.solarize(image, 128)),
        }

    def test_each_branch_equals_pillow(self, config, monkeypatch):
        image = picture(50, 40)
        step = TRANSFORMS.build(three_augment(config))
        grey, solarise, blur = step.transforms
        for branch, name in ((grey, 'grey'), (solarise, 'solarised')):
            augmented = branch({'img': as_bgr(image)})['img']
            assert augmented.dtype == np.uint8
            np.testing.assert_array_equal(as_rgb(augmented), self.candidates(image)[name])
        radii = []

        def spy(radius: float, **_: object) -> ImageFilter.Filter:
            radii.append(radius)
            return BLUR(radius)

        monkeypatch.setattr(ImageFilter, 'GaussianBlur', spy)
        for seed in range(200):
            np.random.seed(seed)
            augmented = as_rgb(blur({'img': as_bgr(image)})['img'])
            np.testing.assert_array_equal(augmented, np.asarray(image.filter(BLUR(radii[-1]))))
        assert len(radii) == 200
        assert 0.1 <= min(radii) < 0.15
        assert 1.95 < max(radii) <= 2.0
        assert abs(np.mean(radii) - 1.05) < 3 * 1.9 / np.sqrt(12 * 200)

    def test_branches_are_equally_likely(self, config):
        image = picture(16, 12)
        step = TRANSFORMS.build(three_augment(config))
        named = self.candidates(image)
        counts = dict.fromkeys((*named, 'blurred'), 0)
        np.random.seed(0)
        for _ in range(1500):
            augmented = as_rgb(step({'img': as_bgr(image)})['img'])
            name = next((name for name, value in named.items() if np.array_equal(value, augmented)), 'blurred')
            counts[name] += 1
        spread = 4 * np.sqrt(1500 * 1 / 3 * 2 / 3)
        assert all(abs(count - 500) < spread for count in counts.values()), counts

    def test_weights_belong_to_the_right_channels(self, config):
        grey = TRANSFORMS.build(three_augment(config)).transforms[0]
        red = np.zeros((2, 2, 3), np.uint8)
        red[..., 2] = 255  # the last channel of BGR
        assert grey({'img': red})['img'][0, 0].tolist() == [76, 76, 76]  # 0.299 * 255


class TestTrainingPipeline:
    """Crop, flip, jitter and the whole chain."""

    def test_order_and_settings(self, config):
        kinds = [step['type'] for step in config.train_pipeline]
        assert kinds == [
            'mmvil.LoadCheckedImage',
            'RandomResizedCrop',
            'RandomFlip',
            'RandomChoice',
            'ColorJitter',
            'PackInputs',
        ]
        crop, flip = config.train_pipeline[1:3]
        assert (crop.scale, crop.crop_ratio_range) == (192, (0.08, 1.0))
        assert crop.aspect_ratio_range == (3 / 4, 4 / 3)
        assert (flip.prob, flip.direction) == (0.5, 'horizontal')

    def test_crop_equals_pillow(self, config):
        image = picture(300, 200)
        step = TRANSFORMS.build(config.train_pipeline[1])
        for seed in range(5):
            np.random.seed(seed)
            top, left, height, width = step.rand_crop_params(as_bgr(image))
            np.random.seed(seed)
            cropped = step({'img': as_bgr(image)})['img']
            expected = tvf.resized_crop(image, top, left, height, width, [192, 192], tv.InterpolationMode.BICUBIC)
            np.testing.assert_array_equal(as_rgb(cropped), np.asarray(expected))

    def test_jitter_equals_torchvision(self, config):
        image = picture(30, 20)
        step = TRANSFORMS.build(config.train_pipeline[4])
        functions = [tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation]
        orders, factors = set(), []
        for seed in range(40):
            np.random.seed(seed)
            order, *drawn = step._rand_params()
            np.random.seed(seed)
            jittered = step({'img': as_bgr(image)})['img']
            expected = image
            for index in order:
                if index < 3:
                    expected = functions[index](expected, drawn[index])
            np.testing.assert_array_equal(as_rgb(jittered), np.asarray(expected))
            assert drawn[3] is None  # no hue
            orders.add(tuple(index for index in order if index < 3))
            factors += drawn[:3]
        assert len(orders) == 6
        assert 0.7 <= min(factors) < 0.72
        assert 1.28 < max(factors) <= 1.3

    def test_from_file_to_batch(self, tmp_path, config):
        for index in range(2):
            picture(120, 90, seed=index).save(tmp_path / f'{index}.jpg')
        pipeline = Compose([TRANSFORMS.build(step) for step in config.train_pipeline])
        samples = [pipeline({'img_path': str(tmp_path / f'{i}.jpg'), 'gt_label': i}) for i in range(2)]
        assert all(sample['inputs'].shape == (3, 192, 192) for sample in samples)
        assert all(sample['inputs'].dtype == torch.uint8 for sample in samples)
        assert [sample['data_samples'].gt_label.item() for sample in samples] == [0, 1]


class TestBatchMixing:
    """Mixup or CutMix, one of them for every batch, with the labels mixed alike."""

    def mixed(self, config: Config, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        np.random.seed(seed)
        torch.manual_seed(seed)
        options = {**config.data_preprocessor, 'num_classes': 4, 'mean': None, 'std': None}
        preprocessor = MODELS.build(
            {'type': 'ClsDataPreprocessor', 'batch_augments': config.model.train_cfg, **options}
        )
        pack = TRANSFORMS.build({'type': 'PackInputs'})
        # Image k is constant 10 * k, so that a pixel tells how much of which image it holds.
        samples = [pack({'img': np.full((8, 8, 3), 10 * k, np.uint8), 'gt_label': k}) for k in range(4)]
        batch = preprocessor(default_collate(samples), training=True)
        return batch['inputs'], torch.stack([sample.gt_score for sample in batch['data_samples']])

    def test_labels_follow_the_pixels(self, config):
        kinds = {'mixup': 0, 'cutmix': 0}
        for seed in range(60):
            images, labels = self.mixed(config, seed)
            torch.testing.assert_close(labels.sum(1), torch.ones(4))
            content = (labels * torch.arange(0, 40, 10)).sum(1)
            torch.testing.assert_close(images.mean((1, 2, 3)), content, rtol=0, atol=1e-4)
            constant = bool((images == images[:, :1, :1, :1]).all())
            kinds['mixup' if constant and images.frac().any() else 'cutmix'] += 1
        assert min(kinds.values()) > 15, kinds

    def test_one_of_two_with_the_recipe_settings(self, config):
        augments = [dict(augment) for augment in config.model.train_cfg.augments]
        assert augments == [{'type': 'Mixup', 'alpha': 0.8}, {'type': 'CutMix', 'alpha': 1.0}]
        assert 'probs' not in config.model.train_cfg  # upstream then chooses evenly and never mixes nothing
