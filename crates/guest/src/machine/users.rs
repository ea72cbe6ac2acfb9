//! Who a program runs as: `user[:group]` against the image's own tables.

use std::fs;

/// A resolved user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Supplementary groups.
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
}

/// Resolves against `/etc/passwd` and `/etc/group` of the container.
pub(super) fn resolve(specification: &str) -> Result<User, String> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    resolve_in(specification, &passwd, &group)
}

fn resolve_in(specification: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (user_word, group_word) = match specification.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (specification, None),
    };
    let user_word = if user_word.is_empty() { "0" } else { user_word };
    let by_name = |fields: &[&str]| fields.first() == Some(&user_word);
    let by_number = |fields: &[&str]| fields.get(2) == Some(&user_word);
    let record = find(passwd, by_name).or_else(|| find(passwd, by_number));
    let (name, uid, primary, home) = match &record {
        Some(fields) => (
            fields.first().copied(),
            field_number(fields, 2).ok_or_else(|| format!("malformed entry of user {user_word}"))?,
            field_number(fields, 3).unwrap_or(0),
            fields
                .get(5)
                .copied()
                .filter(|home| !home.is_empty())
                .unwrap_or("/"),
        ),
        None => {
            let uid = user_word
                .parse()
                .map_err(|_| format!("unable to find user {user_word}"))?;
            (None, uid, 0, if uid == 0 { "/root" } else { "/" })
        }
    };
    let gid = match group_word {
        None => primary,
        Some(word) => match find(group, |fields| fields.first() == Some(&word)) {
            Some(fields) => {
                field_number(&fields, 2).ok_or_else(|| format!("malformed entry of group {word}"))?
            }
            None => word.parse().map_err(|_| format!("unable to find group {word}"))?,
        },
    };
    // Named memberships count unless a group was asked for.
    let mut groups: Vec<u32> = match (name, group_word) {
        (Some(name), None) => records(group)
            .filter(|fields| {
                fields
                    .get(3)
                    .is_some_and(|members| members.split(',').any(|member| member == name))
            })
            .filter_map(|fields| field_number(&fields, 2))
            .collect(),
        _ => Vec::new(),
    };
    groups.push(gid);
    groups.sort_unstable();
    groups.dedup();
    Ok(User {
        uid,
        gid,
        groups,
        home: home.to_owned(),
    })
}

fn records(table: &str) -> impl Iterator<Item = Vec<&str>> {
    table
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.trim_end().split(':').collect())
}

fn find(table: &str, wanted: impl Fn(&[&str]) -> bool) -> Option<Vec<&str>> {
    records(table).find(|fields| wanted(fields))
}

fn field_number(fields: &[&str], index: usize) -> Option<u32> {
    fields.get(index)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{User, resolve_in};

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/srv/web:/bin/false\nodd:x:no:1::/:/\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlogs:x:40:web,other\n";

    fn resolve(specification: &str) -> Result<User, String> {
        resolve_in(specification, PASSWD, GROUP)
    }

    #[test]
    fn nothing_means_root() {
        let root = User {
            uid: 0,
            gid: 0,
            groups: vec![0],
            home: "/root".into(),
        };
        assert_eq!(resolve(""), Ok(root.clone()));
        assert_eq!(resolve("0"), Ok(root.clone()));
        assert_eq!(resolve_in("", "", ""), Ok(root));
    }

    #[test]
    fn names_bring_their_groups_and_home() {
        let web = User {
            uid: 33,
            gid: 34,
            groups: vec![34, 40],
            home: "/srv/web".into(),
        };
        assert_eq!(resolve("web"), Ok(web.clone()));
        assert_eq!(resolve("33"), Ok(web));
    }

    #[test]
    fn a_group_that_is_asked_for_is_the_only_one() {
        assert_eq!(
            resolve("web:logs").map(|user| (user.gid, user.groups)),
            Ok((40, vec![40]))
        );
        assert_eq!(
            resolve("1000:1001").map(|user| (user.uid, user.gid, user.home)),
            Ok((1000, 1001, "/".into()))
        );
    }

    #[test]
    fn unknown_names_are_refused_with_the_name() {
        assert!(resolve("nobody").is_err_and(|message| message.contains("nobody")));
        assert!(resolve("web:nogroup").is_err_and(|message| message.contains("nogroup")));
        assert!(resolve("odd").is_err());
    }
}
