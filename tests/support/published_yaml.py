"""AudioLDM's training YAML as published, anchors and all: the baseline's, this project's seed's, and changed copies."""

import re

import torch
import yaml

CUSTOM = """
metadata_root: "./data/dataset/metadata/dataset_root.json"
log_directory: "./log/latent_diffusion"
project: "audioldm"
precision: "high"
variables:
  sampling_rate: &sampling_rate 16000
  mel_bins: &mel_bins 64
  latent_embed_dim: &latent_embed_dim 8
  latent_t_size: &latent_t_size 256 # TODO might need to change
  latent_f_size: &latent_f_size 16
  in_channels: &unet_in_channels 8
  optimize_ddpm_parameter: &optimize_ddpm_parameter true
  optimize_gpt: &optimize_gpt true
  warmup_steps: &warmup_steps 2000
data: {train: ["audiocaps"], val: "audiocaps", test: "audiocaps", class_label_indices: "audioset_eval_subset",
       dataloader_add_ons: []}
step: {validation_every_n_epochs: 5, save_checkpoint_every_n_steps: 5000, max_steps: 800000, save_top_k: 1}
preprocessing:
  audio: {sampling_rate: *sampling_rate, max_wav_value: 32768.0, duration: 10.24}
  stft: {filter_length: 1024, hop_length: 160, win_length: 1024}
  mel: {n_mel_channels: *mel_bins, mel_fmin: 0, mel_fmax: 8000}
augmentation: {mixup: 0.0}
model:
  target: audioldm_train.modules.latent_diffusion.ddpm.LatentDiffusion
  params:
    first_stage_config:
      base_learning_rate: 8.0e-06
      target: audioldm_train.modules.latent_encoder.autoencoder.AutoencoderKL
      params:
        reload_from_ckpt: "data/checkpoints/vae_mel_16k_64bins.ckpt"
        sampling_rate: *sampling_rate
        batchsize: 4
        monitor: val/rec_loss
        image_key: fbank
        subband: 1
        embed_dim: *latent_embed_dim
        time_shuffle: 1
        lossconfig:
          target: audioldm_train.losses.LPIPSWithDiscriminator
          params: {disc_start: 50001, kl_weight: 1000.0, disc_weight: 0.5, disc_in_channels: 1}
        ddconfig: {double_z: true, mel_bins: *mel_bins, z_channels: 8, resolution: 256, downsample_time: false,
                   in_channels: 1, out_ch: 1, ch: 128, ch_mult: [1, 2, 4], num_res_blocks: 2, attn_resolutions: [],
                   dropout: 0.0}
    base_learning_rate: 1.0e-4
    warmup_steps: *warmup_steps
    optimize_ddpm_parameter: *optimize_ddpm_parameter
    sampling_rate: *sampling_rate
    batchsize: 2
    linear_start: 0.0015
    linear_end: 0.0195
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    unconditional_prob_cfg: 0.1
    parameterization: eps # [eps, x0, v]
    first_stage_key: fbank
    latent_t_size: *latent_t_size
    latent_f_size: *latent_f_size
    channels: *latent_embed_dim
    monitor: val/loss_simple_ema
    scale_by_std: true
    unet_config:
      target: audioldm_train.modules.diffusionmodules.openaimodel.UNetModel
      params: {image_size: 64, extra_film_condition_dim: 1024, in_channels: *unet_in_channels,
               out_channels: *latent_embed_dim, model_channels: 128, attention_resolutions: [8, 4, 2],
               num_res_blocks: 2, channel_mult: [1, 2, 3, 5], num_head_channels: 32, use_spatial_transformer: true,
               transformer_depth: 1, extra_sa_layer: false}
    cond_stage_config:
      film_clap_cond1:
        cond_stage_key: text
        conditioning_key: film
        target: audioldm_train.modules.MSCLAP.msclap.models.clap3.CLAP
        params: {text_model: 'gpt2', transformer_embed_dim: 768, classes_num: 527, audioenc_name: 'HTSAT', out_emb: 768,
                 sample_rate: *sampling_rate, fmin: 50, fmax: 8000, d_proj: 1024, hop_size: 320, mel_bins: 64,
                 window_size: 1024}
    evaluation_params: {unconditional_guidance_scale: 3.5, ddim_sampling_steps: 200, n_candidates_per_samples: 3}
"""
FIRST = "model.params.first_stage_config.params."
UNET = "model.params.unet_config.params."
FILM = "model.params.cond_stage_config.film_clap_cond1."
NO_FILE = {FIRST + "reload_from_ckpt": None}
SMALL = {  # 0.64 s clips and networks that train in a second
    "model.params.latent_t_size": 16, FIRST + "ddconfig.ch": 32, FIRST + "ddconfig.num_res_blocks": 1,
    UNET + "model_channels": 32, UNET + "channel_mult": [1, 2], UNET + "num_res_blocks": 1,
    UNET + "attention_resolutions": [2], "step.save_checkpoint_every_n_steps": 3, "step.max_steps": 6,
    "model.params.warmup_steps": 2, "model.params.evaluation_params.ddim_sampling_steps": 2,
}  # fmt: skip
REMOVED = object()


def tree(changes=None):
    """The seed's settings with those of some dotted paths replaced, added, or REMOVED."""
    written = yaml.safe_load(CUSTOM)
    for path, value in (changes or {}).items():
        *above, last = path.split(".")
        place = written
        for name in above:
            place = place.setdefault(name, {})
        if value is REMOVED:
            del place[last]
        else:
            place[last] = value
    return written


def original():
    """The baseline's settings."""
    written = tree({UNET + "extra_film_condition_dim": 512, UNET + "extra_sa_layer": REMOVED,
                    "step.validation_every_n_epochs": 15})  # fmt: skip
    written["model"]["params"]["cond_stage_config"]["film_clap_cond1"] |= {
        "target": "audioldm_train.conditional_models.CLAPAudioEmbeddingClassifierFreev2",
        "params": {"pretrained_path": "data/checkpoints/clap_music_speech_audioset_epoch_15_esc_89.98.pt",
                   "sampling_rate": 16000, "embed_mode": "text", "amodel": "HTSAT-base"},
    }  # fmt: skip
    return written


def write(path, changes=None):
    """The seed's settings, changed, in a file -> its path."""
    path.write_text(yaml.safe_dump(tree(changes)))
    return path


# --- an AudioLDM checkpoint ---

UNET_NAMES = (  # ours -> AudioLDM's
    (r"^conv_in\.", "input_blocks.0.0."), (r"^down\.(\d+)\.", lambda found: f"input_blocks.{int(found[1]) + 1}."),
    (r"^middle\.", "middle_block."), (r"^up\.", "output_blocks."), (r"^norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."), (r"^film_embed\.", "film_emb."), (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."), (r"\.film\.project\.", ".emb_layers.1."), (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."), (r"\.shortcut\.", ".skip_connection."),
    (r"^(input_blocks\.\d+\.0)\.conv\.", r"\1.op."),
    (r"\.attention\.(\d)\.to_out\.", lambda found: f".transformer_blocks.0.attn{int(found[1]) + 1}.to_out.0."),
    (r"\.attention\.(\d)\.", lambda found: f".transformer_blocks.0.attn{int(found[1]) + 1}."),
    (r"\.attention_norm\.(\d)\.", lambda found: f".transformer_blocks.0.norm{int(found[1]) + 1}."),
    (r"\.feed_forward_norm\.", ".transformer_blocks.0.norm3."),
    (r"\.feed_forward\.proj\.", ".transformer_blocks.0.ff.net.0.proj."),
    (r"\.feed_forward\.out\.", ".transformer_blocks.0.ff.net.2."),
)  # fmt: skip


def checkpoint(path, model, scale=0.7):
    """A model's U-Net, first stage and vocoder in a file as AudioLDM writes it -> its path."""
    unet = {}
    for name, tensor in model.unet.state_dict().items():
        for ours, theirs in UNET_NAMES:
            name = re.sub(ours, theirs, name)
        unet[f"model.diffusion_model.{name}"] = tensor
    vae = {f"first_stage_model.{name}": tensor for name, tensor in model.vae.state_dict().items()}
    vocoder = {f"first_stage_model.vocoder.{name}": tensor for name, tensor in model.vocoder.state_dict().items()}
    torch.save({"state_dict": unet | vae | vocoder | {"scale_factor": torch.tensor(scale)}}, path)
    return path


def first_stage(path, model, vocoder=False):
    """A model's VAE, with the vocoder or without it, as AudioLDM writes a first stage -> its path."""
    state = dict(model.vae.state_dict())
    if vocoder:
        state |= {f"vocoder.{name}": tensor for name, tensor in model.vocoder.state_dict().items()}
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}}, path)
    return path
