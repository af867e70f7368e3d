//! The daemon: serves a pool's volumes. See `pando_engine::daemon`.

fn main() {}
