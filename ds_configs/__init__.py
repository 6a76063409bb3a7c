"""DeepSpeed configurations, installed as `dnazen_ds_configs`; with this file every way of installing finds them."""
