//! A revision's root: one read-only overlay of the image's layers under a small layer of neap's
//! own, mounted once in the launcher's mount namespace and used by every instance. Containers
//! bind it in their own mount namespaces, so it needs no copy per create.

use super::devices;
use super::egress::Policy;
use super::image_root::ImageRoot;
use super::layers::{IdMaps, Layers, overlay};
use super::mounted_volumes::{MountedVolume, Volumes};
use super::names::RESOLVER;
use super::own_layer::{OwnLayer, WorkingDir};
use super::secret_files::SecretFiles;
use super::user::User;
use super::wire::{Refusal, RootOrder};
use crate::model::permissions::Network;
use nix::mount::MntFlags;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Docker stops at 127. Each is a few letters of the overlay's options, which fit a page.
const LAYERS_MAX: usize = 128;

/// A revision's root, mounted. Instances keep it; the last one to go unmounts it.
pub struct Mounted {
    dir: PathBuf,
    pub order: RootOrder,
    pub user: User,
    pub working_dir: WorkingDir,
    pub hostname: String,
    /// With where instances have them: paths without symlinks.
    volumes: Vec<(Rc<MountedVolume>, PathBuf)>,
    /// Where instances have directories of the node: paths without symlinks.
    node_places: Vec<PathBuf>,
    secrets: Option<SecretFiles>,
    /// Where instances have the secrets: paths without symlinks.
    secret_dirs: Vec<PathBuf>,
    pub policy: Option<Rc<Policy>>,
}

impl Mounted {
    /// The mounted overlay.
    pub fn path(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// An empty directory, for each instance's own mounts.
    pub fn scratch(&self) -> PathBuf {
        self.dir.join("look")
    }

    /// Mounts of the launcher that instances can write, and where.
    pub fn volume_mounts(&self) -> impl Iterator<Item = (&Path, &Path)> {
        self.volumes.iter().map(|(volume, at)| (volume.dir.as_path(), at.as_path()))
    }

    /// In the order of the manifest.
    pub fn node_places(&self) -> &[PathBuf] {
        &self.node_places
    }

    /// Brings the secrets up to date.
    pub fn refresh_secrets(&self) -> Result<(), String> {
        self.secrets.as_ref().map_or(Ok(()), SecretFiles::refresh)
    }

    /// Directories of the launcher that instances see read-only, and where.
    pub fn secret_mounts(&self) -> impl Iterator<Item = (&Path, &Path)> {
        let places = |secrets| self.secret_dirs.iter().map(move |at| (secrets, at.as_path()));
        self.secrets.iter().map(|secrets| secrets.dir.as_path()).flat_map(places)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Whatever is still mounted below is read-only, so that this can't reach an image's files.
        let _ = nix::mount::umount2(&self.path(), MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Mounts a revision's root in `dir`, which does not exist yet.
pub fn mount(
    dir: PathBuf,
    order: RootOrder,
    id_maps: Option<&mut IdMaps>,
    volumes: &mut Volumes,
    data_dir: &Path,
) -> Result<Mounted, Refusal> {
    check(&order)?;
    let uid_base = if id_maps.is_some() { order.uid_base } else { 0 };
    let allow = &order.permissions.allow;
    if !allow.capabilities.is_empty() && id_maps.is_none() {
        let text = "allow.capabilities: this node has no user namespaces to keep them in, see `neap doctor`";
        return Err(Refusal::Unusable(text.to_owned()));
    }
    if allow.network == Network::Host && id_maps.is_none() {
        // Sockets of the node's that trust uid 0 of its network namespace would obey it.
        let text = "allow.network = \"host\": this node has no user namespaces, and the function's root would be \
                    the node's there, see `neap doctor`";
        return Err(Refusal::Unusable(text.to_owned()));
    }
    devices::find(&allow.devices).map_err(Refusal::Unusable)?;
    let namespace = match id_maps {
        Some(maps) => Some(maps.range(order.uid_base).map_err(failed("make a user namespace"))?),
        None => None,
    };
    // From here on a failure cleans up after itself: `Mounted` and `Layers` unmount when dropped.
    let mut mounted = Mounted {
        hostname: hostname(&order.key),
        dir,
        order,
        user: User { uid: 0, gid: 0, groups: Vec::new(), home: String::new() },
        working_dir: WorkingDir::default(),
        volumes: Vec::new(),
        node_places: Vec::new(),
        secrets: None,
        secret_dirs: Vec::new(),
        policy: None,
    };
    let dir = mounted.dir.clone();
    for part in ["rootfs", "look", "none", "own"] {
        fs::create_dir_all(dir.join(part)).map_err(failed("make a directory for the root"))?;
    }
    let layers = Layers::attach(&dir, &mounted.order.layers, namespace)
        .map_err(failed("attach the image's layers"))?;

    overlay(&dir, "none", layers.count, "look").map_err(failed("mount the image's layers"))?;
    let looked = look(&mut mounted, &layers.topmost(), uid_base);
    let _ = nix::mount::umount2(&dir.join("look"), MntFlags::MNT_DETACH);
    let mut places = looked?;
    mounted.node_places = places.split_off(mounted.order.volumes.len());
    let owner = (uid_base + mounted.user.uid, uid_base + mounted.user.gid);
    for (order, at) in mounted.order.volumes.iter().zip(places) {
        let volume = volumes.mount(order, namespace.map(AsFd::as_fd), owner).map_err(|err| {
            Refusal::Failed(format!("mount volume `{}` ({}): {err}", order.name, order.file.display()))
        })?;
        mounted.volumes.push((volume, at));
    }

    let secrets = &mounted.order.permissions.secrets;
    if !secrets.is_empty() {
        let files = SecretFiles::new(dir.join("secrets"), data_dir, secrets.clone(), uid_base)
            .map_err(failed("make a directory for secrets"))?;
        files.refresh().map_err(Refusal::Unusable)?;
        mounted.secrets = Some(files);
    }

    overlay(&dir, "own", layers.count, "rootfs").map_err(failed("mount the root"))?;
    Ok(mounted)
}

/// Finds in the image what is asked for, and fills neap's own layer. Returns where volumes belong, and
/// then where directories of the node do.
fn look(mounted: &mut Mounted, topmost: &Path, uid_base: u32) -> Result<Vec<PathBuf>, Refusal> {
    let image =
        ImageRoot::open(&mounted.dir.join("look"), uid_base).map_err(failed("open the image's root"))?;
    let order = &mounted.order;
    let (passwd, group) = (image.read_small("/etc/passwd")?, image.read_small("/etc/group")?);
    mounted.user = User::resolve(&order.user, &passwd, &group).map_err(Refusal::Unusable)?;
    let own = OwnLayer { dir: mounted.dir.join("own"), uid_base };
    let resolver = (order.permissions.allow.network == Network::Egress).then_some(RESOLVER);
    own.fill(&image, topmost, &mounted.hostname, resolver).map_err(failed("make the root's own layer"))?;
    if !order.permissions.secrets.is_empty() {
        for wanted in &order.secret_dirs {
            let at = own.mount_point(&image, wanted);
            let at =
                at.map_err(|why| Refusal::Unusable(format!("the place of secrets, `{wanted}`, {why}")))?;
            mounted.secret_dirs.push(at);
        }
    }
    let mut places: Vec<PathBuf> = Vec::new();
    let of_the_node = order.permissions.node_volumes.iter().map(|volume| &volume.path);
    for path in order.volumes.iter().map(|volume| &volume.path).chain(of_the_node) {
        let refused = |why: &str| Refusal::Unusable(format!("volume.path `{path}` {why}"));
        let at = own.mount_point(&image, path).map_err(|why| refused(&why))?;
        // What an image's symlinks lead together: one would be mounted inside the other, where the
        // function could put symlinks of its own.
        let mut others = places.iter().chain(&mounted.secret_dirs);
        if others.any(|other| other.starts_with(&at) || at.starts_with(other)) {
            return Err(refused("leads into another volume or to the secrets"));
        }
        places.push(at);
    }
    mounted.working_dir = own.working_dir(&image, &order.working_dir)?;
    let in_volume = |path: &Path| places.iter().any(|volume| path.starts_with(volume));
    // Whether it is there only the volume can tell, and what it is: each instance makes sure.
    if in_volume(Path::new(&mounted.working_dir.path)) {
        mounted.working_dir.is_made_in_each = true;
    }
    let command = Path::new(&mounted.working_dir.path).join(&order.command[0]);
    if !(order.command[0].contains('/') && in_volume(&command)) {
        image.check_command(&order.command[0], &order.env, &mounted.working_dir.path, &mounted.user)?;
    }
    Ok(places)
}

fn failed(doing: &str) -> impl FnOnce(io::Error) -> Refusal + '_ {
    move |err| Refusal::Failed(format!("{doing}: {err}"))
}

fn check(order: &RootOrder) -> Result<(), Refusal> {
    let unusable = |text: String| Err(Refusal::Unusable(text));
    if order.layers.is_empty() {
        return unusable("the image has no layers".to_owned());
    }
    if order.layers.len() > LAYERS_MAX {
        return unusable(format!("the image has {} layers, {LAYERS_MAX} at most", order.layers.len()));
    }
    if order.command.first().is_none_or(String::is_empty) {
        return unusable("neither the image nor the manifest names a command".to_owned());
    }
    if order.command.iter().chain(&order.env).any(|text| text.contains('\0')) {
        return unusable("the command or an environment variable contains NUL".to_owned());
    }
    Ok(())
}

/// The function's name: the key up to the revision's number.
fn hostname(key: &str) -> String {
    let name = key.rsplit_once('.').map_or(key, |(name, _)| name);
    name.chars().take(63).collect() // HOST_NAME_MAX is 64 with its end
}

#[cfg(test)]
mod tests {
    use super::hostname;

    #[test]
    fn hostname_is_the_functions_name() {
        assert_eq!(hostname("thermostat.3"), "thermostat");
        assert_eq!(hostname("plain"), "plain");
    }
}
