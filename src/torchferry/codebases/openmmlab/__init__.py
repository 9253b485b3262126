"""OpenMMLab: models by their configs, deploy configs as MMDeploy has them, weights, pictures and rewriters."""
