"""Settings of earlier versions, and what is said to whoever still gives them."""

GONE = {name: answer for answer, names in {
    "is gone: sampling takes the averaged weights": "model.ema",
    "is gone: the record of verify.lfw_faces says which images were aligned": "verify.lfw_images",
    "is gone: one in ten identities (stage 6) or one in 25 (stage 0) is held out": "fr.held_out_identities "
    "training.held_out_identities",
    "is gone: each entry of BACKBONES in models/backbones.py has its own": "fr.embedding_size",
    "is gone: half of the images are mirrored": "diffusion.flip",
    "is a constant now, in utils/recognition/embedding.py": "scores.batch_size verify.batch_size",
    "is a constant now, in align.py": "align.batch_size",
    "is a constant now, in plot_distributions.py": "scores.bootstrap",
    "is a constant now, in train_fr.py": "fr.dropout fr.momentum fr.weight_decay fr.gradient_clip fr.patience fr.early_stop",
    "is a constant now, in utils/recognition/dynunc.py": "fr.dynunc_window fr.keep_fractions",
    "is a constant now, in utils/training/faces.py": "training.margin",
    "is a constant now, in train_diffusion.py": "diffusion.validations",
    "is a constant now, in train_autoencoder.py or utils/training/autoencoder_loss.py": "autoencoder.perceptual "
    "autoencoder.identity autoencoder.batch_size autoencoder.learning_rate",
    "is now fr.milestones; empty is the plateau schedule": "fr.schedule",
    "is now training.precision": "fr.precision",
    "is now training.compile": "fr.compile",
    "is now contexts.recogniser": "training.recogniser",
    "is now training.length, for example 90min or 150000steps": "autoencoder.minutes autoencoder.steps diffusion.minutes "
    "diffusion.steps",
    "is now extras.identity": "diffusion.identity",
    "is now an entry of extras.use": "diffusion.null_contexts diffusion.same_person diffusion.context_noise "
    "diffusion.latent_noise diffusion.scale_contexts diffusion.prediction diffusion.optimizer diffusion.schedule",
    "is now part of training.size, an entry of SIZES in models/sizes.py": "training.image_size autoencoder.channels "
    "autoencoder.layers autoencoder.code_channels autoencoder.codes diffusion.initial_channels diffusion.channel_multipliers "
    "diffusion.attention diffusion.blocks diffusion.context_channels diffusion.context_dropout",
}.items() for name in names.split()}
