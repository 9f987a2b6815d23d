//! Pulling from a real registry over links that are not: through a proxy that cuts, stalls, lies.

mod deploys;
mod disk;
mod network;
mod signed;
mod ways;

use crate::support::TestDir;
use crate::support::registry::{Proxy, Registry, random_image};
use neap::config::defaults;
use neap::config::images::{Images, Trust};
use neap::image::{ImageError, ImageStore, Patience};
use neap::model::Reference;
use neap::model::api::ImageSummary;
use std::path::PathBuf;
use std::sync::Arc;

const NEAP: &str = env!("CARGO_BIN_EXE_neap");
const MIB: usize = 1 << 20;

/// A registry, the proxy in front of it, and an image store that pulls through the proxy.
struct Site {
    registry: Registry,
    proxy: Proxy,
    dir: TestDir,
    store: ImageStore,
    images: Images,
    trust: Trust,
}

impl Site {
    fn new(name: &str) -> Self {
        let registry = Registry::start();
        let proxy = Proxy::start(registry.port());
        let dir = TestDir::new(name);
        let store = ImageStore::open(&dir.join("data"), NEAP.into()).expect("opens");
        let images = Images { insecure: vec![proxy.host()], ..defaults::images() };
        let site = Self { registry, proxy, dir, store, images, trust: defaults::trust() };
        site.configure();
        site
    }

    fn configure(&self) {
        self.store.configure(&self.images, &self.trust);
    }

    /// Pushes an image of random layers as `NAME:1`.
    fn push(&self, name: &str, layers: &[usize]) {
        let source = random_image(self.dir.path(), name, layers);
        self.registry.push(&source, &format!("{name}:1"));
    }

    /// As it is called through the proxy.
    fn name(&self, name: &str) -> Reference {
        Reference::parse(&format!("{}/{name}", self.proxy.host())).expect("a reference")
    }

    fn pull(&self, name: &str) -> Result<ImageSummary, Arc<ImageError>> {
        self.pull_from(&self.proxy.host(), name)
    }

    fn pull_from(&self, host: &str, name: &str) -> Result<ImageSummary, Arc<ImageError>> {
        let name = Reference::parse(&format!("{host}/{name}")).expect("a reference");
        let mut pull = self.store.pull(&name, Patience::Bounded).expect("is taken");
        let driving = async {
            self.store.drive().await;
            unreachable!("it goes on for ever")
        };
        smol::block_on(smol::future::or(async { pull.done().await }, driving))
    }

    fn refused(&self, name: &str) -> String {
        self.pull(name).expect_err("refused").to_string()
    }

    fn images_dir(&self) -> PathBuf {
        self.dir.join("data/images")
    }

    fn entries(&self, below: &str) -> usize {
        std::fs::read_dir(self.images_dir().join(below)).expect("there").count()
    }
}
