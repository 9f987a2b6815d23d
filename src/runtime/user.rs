//! Who a function runs as: `user[:group]` of an image's config against the image's own
//! /etc/passwd and /etc/group, as docker resolves it. Pure; the files' text is an argument.

/// Ids inside the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

/// A user namespace maps this many ids; a larger one would be nobody's.
const IDS: u32 = crate::model::function::UID_RANGE;

/// More supplementary groups than the kernel takes (NGROUPS_MAX is 65,536) help nobody.
const GROUPS_MAX: usize = 1024;

impl User {
    /// `spec` may be empty, `name`, `1000`, `name:group`, `1000:1000`.
    pub fn resolve(spec: &str, passwd: &str, group: &str) -> Result<Self, String> {
        let (name, wanted_group) = match spec.split_once(':') {
            Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
            None => (spec, None),
        };
        let name = if name.is_empty() { "0" } else { name };
        let entry = Account::find(passwd, name);
        let mut user = match (&entry, name.parse::<u32>()) {
            (Some(entry), _) => {
                Self { uid: entry.uid, gid: entry.gid, groups: Vec::new(), home: entry.home.to_owned() }
            }
            (None, Ok(uid)) => Self { uid, gid: 0, groups: Vec::new(), home: "/".to_owned() },
            (None, Err(_)) => return Err(format!("user `{name}` is not in the image's /etc/passwd")),
        };
        match wanted_group {
            Some(wanted) => {
                let found = groups(group).find(|g| g.name == wanted).map(|g| g.gid);
                user.gid = match found.or_else(|| wanted.parse().ok()) {
                    Some(gid) => gid,
                    None => return Err(format!("group `{wanted}` is not in the image's /etc/group")),
                };
            }
            None => {
                let account = entry.map_or("", |entry| entry.name);
                let member =
                    groups(group).filter(|g| g.members.split(',').any(|m| !m.is_empty() && m == account));
                user.groups = member.map(|g| g.gid).filter(|gid| *gid < IDS).take(GROUPS_MAX).collect();
            }
        }
        if user.home.is_empty() {
            user.home = "/".to_owned();
        }
        match user.uid.max(user.gid) {
            id if id >= IDS => {
                Err(format!("id {id} of user `{spec}` is not below {IDS}, what a function has"))
            }
            _ => Ok(user),
        }
    }
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    /// By name, else by number: the first that fits, like docker.
    fn find(passwd: &'a str, wanted: &str) -> Option<Self> {
        let by_name = accounts(passwd).find(|account| account.name == wanted);
        by_name.or_else(|| {
            let uid: u32 = wanted.parse().ok()?;
            accounts(passwd).find(|account| account.uid == uid)
        })
    }
}

/// passwd(5): name:password:uid:gid:gecos:home:shell. Lines that are none are passed over.
fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let fields: Vec<_> = line.splitn(7, ':').collect();
        match fields[..] {
            [name, _, uid, gid, _, home, ..] => {
                Some(Account { name, uid: uid.parse().ok()?, gid: gid.parse().ok()?, home })
            }
            _ => None,
        }
    })
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// group(5): name:password:gid:members.
fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let fields: Vec<_> = line.splitn(4, ':').collect();
        match fields[..] {
            [name, _, gid, members] => Some(Group { name, gid: gid.parse().ok()?, members: members.trim() }),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\nbroken\n7:x:70:70::/seven:\n";
    const GROUP: &str = "root:x:0:\napp:x:1001:\naudio:x:29:app,other\ndialout:x:20:other,app\n";

    fn resolve(spec: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        User::resolve(spec, PASSWD, GROUP).map(|u| (u.uid, u.gid, u.groups, u.home))
    }

    #[test]
    fn users_are_resolved_as_docker_does() {
        let home = |text: &str| text.to_owned();
        assert_eq!(resolve(""), Ok((0, 0, vec![], home("/root"))));
        assert_eq!(resolve("app"), Ok((1000, 1001, vec![29, 20], home("/home/app"))));
        assert_eq!(resolve("1000"), Ok((1000, 1001, vec![29, 20], home("/home/app"))));
        assert_eq!(resolve("app:audio"), Ok((1000, 29, vec![], home("/home/app"))));
        assert_eq!(resolve("app:5"), Ok((1000, 5, vec![], home("/home/app"))));
        assert_eq!(resolve("4321"), Ok((4321, 0, vec![], home("/"))));
        assert_eq!(resolve("4321:app"), Ok((4321, 1001, vec![], home("/"))));
        // a name that looks like a number is a name first
        assert_eq!(resolve("7"), Ok((70, 70, vec![], home("/seven"))));
    }

    #[test]
    fn unknown_names_and_ids_beyond_the_range_are_refused() {
        assert!(resolve("nobody").is_err());
        assert!(resolve("app:nogroup").is_err());
        assert!(resolve("65536").is_err());
        assert!(resolve("0:4294967295").is_err());
        assert!(resolve("-1").is_err());
    }

    #[test]
    fn image_without_account_files_has_root() {
        let root = User { uid: 0, gid: 0, groups: vec![], home: "/".to_owned() };
        assert_eq!(User::resolve("", "", ""), Ok(root));
    }
}
