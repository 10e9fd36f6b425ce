//! Whatever stands on standard input or in the environment, the parser answers with a call or a coded error.

use keelway_cni::{AddResult, Environment, Interface, Invocation, NetConf, Version};
use proptest::prelude::*;
use serde_json::Value;

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        prop::sample::select(vec![
            "1.0.0", "0.4.0", "1.1.0", "2", "keelway", "/run/x", "", "a/b"
        ])
        .prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        let key = prop_oneof![
            prop::sample::select(vec![
                "cniVersion",
                "name",
                "type",
                "socket",
                "spool",
                "prevResult",
                "cni.dev/valid-attachments",
                "containerID",
                "ifname",
                "ips",
                "address",
                "runtimeConfig",
                "portMappings",
                "hostPort",
                "containerPort",
                "bandwidth",
                "ingressRate",
                "mac",
                "dns",
                "args",
                "cni",
                "interfaces",
            ])
            .prop_map(str::to_owned),
            ".{0,8}",
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key, inner), 0..8)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

fn environment() -> impl Strategy<Value = Environment> {
    let command = prop_oneof![
        prop::sample::select(vec!["ADD", "DEL", "CHECK", "GC", "STATUS"]).prop_map(str::to_owned),
        ".{0,6}",
    ];
    let text = || prop::option::of(prop_oneof!["[a-z0-9]{1,20}", ".{0,24}"]);
    (
        prop::option::of(command),
        text(),
        text(),
        text(),
        prop::option::of("([A-Z]=[a-z];?){0,3}|.{0,12}"),
    )
        .prop_map(|(command, container_id, netns, ifname, args)| Environment {
            command,
            container_id,
            netns,
            ifname,
            args,
        })
}

fn holds(env: &Environment, config: &[u8]) -> Result<(), TestCaseError> {
    match Invocation::parse(env, config) {
        Ok(call) => {
            prop_assert!(call.conf.socket.is_absolute() && call.conf.spool.is_absolute());
            if let Some(attachment) = &call.attachment {
                // Both become part of a file name and of an interface name.
                let file = attachment.to_string();
                prop_assert!(!file.contains('/') && !file.starts_with('.') && file.len() <= 255);
                prop_assert!(attachment.ifname.len() <= 15 && !attachment.ifname.is_empty());
            }
        }
        Err(error) => {
            prop_assert!(
                matches!(u32::from(error.code), 1 | 2 | 4 | 6 | 7),
                "{}",
                error
            );
            prop_assert!(!error.msg.is_empty());
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_json_is_taken_or_refused(env in environment(), config in json()) {
        holds(&env, config.to_string().as_bytes())?;
    }

    #[test]
    fn any_bytes_are_taken_or_refused(env in environment(), config in prop::collection::vec(any::<u8>(), 0..64)) {
        holds(&env, &config)?;
    }

    #[test]
    fn whatever_came_before_in_a_chain_is_kept(previous in json()) {
        let config = serde_json::json!({"cniVersion": "1.1.0", "name": "x", "prevResult": previous});
        let Ok(conf) = NetConf::parse(config.to_string().as_bytes()) else { return Ok(()) };
        let ours = AddResult {
            interfaces: vec![Interface { name: "eth0".into(), mac: String::new(), mtu: 1500, sandbox: None }],
            ..AddResult::default()
        };
        let all = ours.render(Version::V1_1_0, conf.prev_result.as_ref());
        prop_assert_eq!(&all["cniVersion"], "1.1.0");
        let interfaces = all["interfaces"].as_array().expect("a list");
        prop_assert_eq!(&interfaces.last().expect("ours")["name"], "eth0");
        for (key, value) in conf.prev_result.iter().flatten() {
            match key.as_str() {
                "cniVersion" => {}
                "interfaces" => prop_assert_eq!(&interfaces[..interfaces.len() - 1], value.as_array().map_or(&[][..], Vec::as_slice)),
                "ips" | "routes" if value.is_null() => {}
                other => prop_assert_eq!(&all[other], value),
            }
        }
    }

    #[test]
    fn a_cut_configuration_is_refused(at in 0usize..72) {
        let whole = br#"{"cniVersion":"1.0.0","name":"keelway","type":"keelway-cni","prevResult":{}}"#;
        let env = Environment {
            command: Some("DEL".into()), container_id: Some("c1".into()), ifname: Some("eth0".into()),
            ..Environment::default()
        };
        prop_assert_eq!(Invocation::parse(&env, &whole[..at]).map_err(|error| u32::from(error.code)).err(), Some(6));
    }
}
