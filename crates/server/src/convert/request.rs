//! Requests about instances, from the wire to the engine: schema, grammars, defaults, and a clear refusal of
//! what this server cannot do yet.

use std::collections::BTreeMap;

use hypeman_api::error::code;
use hypeman_api::instance as api;
use hypeman_api::policy::{AutoStandbyPolicy, HealthCheck, HealthCheckType, RestartMode, RestartPolicy};
use hypeman_core::{bandwidth, duration, name, rate, size, tags, time};
use hypeman_engine::{CreateInstance, Expiry, InstanceUpdate, NetworkRequest, StartOverrides};
use jiff::Timestamp;

use super::compression;
use super::image::platform;
use super::instance::hypervisor_to_engine;
use crate::error::{ApiError, ApiResult};

const DEFAULT_SIZE: &str = "1GB";
const DEFAULT_OVERLAY: &str = "10GB";
const DEFAULT_VCPUS: i32 = 2;

/// A request for an instance, checked.
///
/// # Errors
/// 400 with the code of the offending field.
pub fn create(request: api::CreateInstanceRequest, now: Timestamp) -> ApiResult<CreateInstance> {
    // The schema layer answers for names, as for every pattern of the document.
    name::check(&request.name).map_err(|error| ApiError::schema(error.message))?;
    if request.image.trim().is_empty() {
        return Err(ApiError::schema("image is required"));
    }
    refuse_unsupported(&request)?;
    let platform = platform(request.platform.as_deref())?;
    let memory_bytes = size::parse(request.size.as_deref().unwrap_or(DEFAULT_SIZE))
        .map_err(|error| error.in_field("size"))?;
    let hotplug_bytes = match request.hotplug_size.as_deref() {
        None | Some("") => 0,
        Some(text) => size::parse(text).map_err(|error| {
            error
                .in_field("hotplug_size")
                .with_code(code::INVALID_HOTPLUG_SIZE)
        })?,
    };
    let overlay_bytes =
        size::parse(request.overlay_size.as_deref().unwrap_or(DEFAULT_OVERLAY)).map_err(|error| {
            error
                .in_field("overlay_size")
                .with_code(code::INVALID_OVERLAY_SIZE)
        })?;
    let vcpus = u32::try_from(request.vcpus.unwrap_or(DEFAULT_VCPUS))
        .ok()
        .filter(|vcpus| *vcpus > 0)
        .ok_or_else(|| ApiError::schema("vcpus must be at least 1"))?;
    let disk_io_bytes_per_second = match request.disk_io_bps.as_deref() {
        None | Some("") => None,
        Some(text) => Some(rate::parse(text).map_err(|error| error.in_field("disk_io_bps"))?),
    };
    check_environment(&request.env)?;
    check_command("entrypoint", request.entrypoint.as_deref())?;
    check_command("cmd", request.cmd.as_deref())?;
    tags::check(&request.tags)?;
    let snapshot_policy = compression::policy(request.snapshot_policy.as_ref())?;
    Ok(CreateInstance {
        name: request.name,
        image: request.image,
        platform,
        memory_bytes,
        hotplug_bytes,
        overlay_bytes,
        vcpus,
        disk_io_bytes_per_second,
        environment: request.env,
        network: network(request.network.unwrap_or_default())?,
        hypervisor: request.hypervisor.map(hypervisor_to_engine),
        entrypoint: request.entrypoint,
        command: request.cmd,
        tags: request.tags,
        skip_kernel_headers: request.skip_kernel_headers.unwrap_or(false),
        skip_guest_agent: request.skip_guest_agent.unwrap_or(false),
        snapshot_policy,
        expiry: expiry(request.ttl.as_deref(), request.expires_at.as_deref(), now)?,
    })
}

fn network(request: api::CreateInstanceNetwork) -> ApiResult<NetworkRequest> {
    let limit = |text: Option<&str>, field: &str, code: &'static str| match text {
        None | Some("") => Ok(None),
        Some(text) => bandwidth::parse(text)
            .map(|rate| Some(rate).filter(|rate| *rate > 0))
            .map_err(|error| ApiError::from(error.in_field(field).with_code(code))),
    };
    let download = request.bandwidth_download.as_deref();
    let upload = request.bandwidth_upload.as_deref();
    Ok(NetworkRequest {
        enabled: request.enabled.unwrap_or(true),
        bandwidth_download: limit(
            download,
            "network.bandwidth_download",
            code::INVALID_BANDWIDTH_DOWNLOAD,
        )?,
        bandwidth_upload: limit(upload, "network.bandwidth_upload", code::INVALID_BANDWIDTH_UPLOAD)?,
    })
}

/// When an instance expires, of the two exclusive ways to say it.
fn expiry(ttl: Option<&str>, expires_at: Option<&str>, now: Timestamp) -> ApiResult<Option<Expiry>> {
    match (ttl, expires_at) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(ApiError::invalid(
            code::INVALID_REQUEST,
            "ttl and expires_at exclude each other: give one of them",
        )),
        (Some(ttl), None) => {
            let ttl = duration::parse_non_negative(ttl)
                .map_err(|error| error.in_field("ttl").with_code(code::INVALID_TTL))?;
            Ok(Some(if ttl.is_zero() {
                Expiry::Never
            } else {
                Expiry::After(ttl)
            }))
        }
        (None, Some(text)) => {
            let at = time::parse(text)
                .map_err(|error| error.in_field("expires_at").with_code(code::INVALID_EXPIRES_AT))?;
            if at <= now {
                return Err(ApiError::invalid(
                    code::INVALID_EXPIRES_AT,
                    "expires_at must be in the future",
                ));
            }
            Ok(Some(Expiry::At(at)))
        }
    }
}

/// A change of an instance, checked.
///
/// # Errors
/// 400 with the code of the offending field.
pub fn update(request: &api::UpdateInstanceRequest, now: Timestamp) -> ApiResult<InstanceUpdate> {
    if request.env.is_some() {
        return Err(ApiError::invalid(
            code::INVALID_REQUEST,
            "env: only variables that a credential of the instance names can change, and this instance has none",
        ));
    }
    auto_standby(request.auto_standby.as_ref())?;
    health_check(request.health_check.as_ref())?;
    restart_policy(request.restart_policy.as_ref())?;
    Ok(InstanceUpdate {
        expiry: expiry(request.ttl.as_deref(), request.expires_at.as_deref(), now)?,
    })
}

/// New entrypoint and command of a start, checked.
///
/// # Errors
/// 400 `invalid_request`.
pub fn start(request: api::StartInstanceRequest) -> ApiResult<StartOverrides> {
    check_command("entrypoint", request.entrypoint.as_deref())?;
    check_command("cmd", request.cmd.as_deref())?;
    Ok(StartOverrides {
        entrypoint: request.entrypoint,
        command: request.cmd,
    })
}

fn check_environment(environment: &BTreeMap<String, String>) -> ApiResult<()> {
    for (key, value) in environment {
        if key.is_empty() || key.contains(['=', '\0']) {
            return Err(ApiError::invalid(
                code::INVALID_REQUEST,
                format!("env: {key:?} cannot be a variable's name"),
            ));
        }
        if value.contains('\0') {
            return Err(ApiError::invalid(
                code::INVALID_REQUEST,
                format!("env: the value of {key:?} holds a null byte"),
            ));
        }
    }
    Ok(())
}

fn check_command(field: &str, words: Option<&[String]>) -> ApiResult<()> {
    if words.unwrap_or_default().iter().any(|word| word.contains('\0')) {
        return Err(ApiError::invalid(
            code::INVALID_REQUEST,
            format!("{field}: a word holds a null byte"),
        ));
    }
    Ok(())
}

/// Refuses what later versions of the server will do, so that nothing is silently left out.
fn refuse_unsupported(request: &api::CreateInstanceRequest) -> ApiResult<()> {
    let refuse = |what: &str| Err(not_yet(code::INVALID_REQUEST, what));
    if !request.credentials.is_empty() {
        return refuse("credentials");
    }
    let egress = request
        .network
        .as_ref()
        .and_then(|network| network.egress.as_ref());
    if egress.and_then(|egress| egress.enabled).unwrap_or(false) {
        return refuse("network.egress");
    }
    if !request.devices.is_empty() {
        return refuse("devices");
    }
    let profile = request.gpu.as_ref().and_then(|gpu| gpu.profile.as_deref());
    if profile.is_some_and(|profile| !profile.is_empty()) {
        return refuse("gpu");
    }
    if !request.volumes.is_empty() {
        return refuse("volumes");
    }
    auto_standby(request.auto_standby.as_ref())?;
    health_check(request.health_check.as_ref())?;
    restart_policy(request.restart_policy.as_ref())
}

fn not_yet(code: &'static str, what: &str) -> ApiError {
    ApiError::invalid(
        code,
        format!("{what} is not supported by this server yet; leave it out"),
    )
}

fn check_duration(field: &str, code: &'static str, text: Option<&str>) -> ApiResult<()> {
    if let Some(text) = text.filter(|text| !text.is_empty()) {
        duration::parse_non_negative(text).map_err(|error| error.in_field(field).with_code(code))?;
    }
    Ok(())
}

fn auto_standby(policy: Option<&AutoStandbyPolicy>) -> ApiResult<()> {
    let Some(policy) = policy else { return Ok(()) };
    let code = code::INVALID_AUTO_STANDBY;
    check_duration("auto_standby.idle_timeout", code, policy.idle_timeout.as_deref())?;
    if policy.enabled.unwrap_or(false) {
        return Err(not_yet(code, "auto_standby"));
    }
    Ok(())
}

fn health_check(check: Option<&HealthCheck>) -> ApiResult<()> {
    let Some(check) = check else { return Ok(()) };
    let code = code::INVALID_HEALTH_CHECK;
    check_duration("health_check.interval", code, check.interval.as_deref())?;
    check_duration("health_check.timeout", code, check.timeout.as_deref())?;
    check_duration("health_check.start_period", code, check.start_period.as_deref())?;
    let probes = check.http.is_some() || check.tcp.is_some() || check.exec.is_some();
    match check.kind.unwrap_or_default() {
        HealthCheckType::None if probes => Err(ApiError::invalid(
            code,
            "health_check: a probe is given, but type is none",
        )),
        HealthCheckType::None => Ok(()),
        HealthCheckType::Http | HealthCheckType::Tcp | HealthCheckType::Exec => {
            Err(not_yet(code, "health_check"))
        }
    }
}

fn restart_policy(policy: Option<&RestartPolicy>) -> ApiResult<()> {
    let Some(policy) = policy else { return Ok(()) };
    let code = code::INVALID_RESTART_POLICY;
    check_duration("restart_policy.backoff", code, policy.backoff.as_deref())?;
    check_duration(
        "restart_policy.stable_after",
        code,
        policy.stable_after.as_deref(),
    )?;
    match policy.policy.unwrap_or(RestartMode::Never) {
        RestartMode::Never => Ok(()),
        RestartMode::Always | RestartMode::OnFailure => Err(not_yet(code, "restart_policy")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;

    fn now() -> Timestamp {
        "2026-06-01T00:00:00Z".parse().unwrap()
    }

    fn created(mut extra: Value) -> ApiResult<CreateInstance> {
        let fields = extra.as_object_mut().unwrap();
        fields.entry("name").or_insert_with(|| json!("web"));
        fields.entry("image").or_insert_with(|| json!("alpine"));
        create(serde_json::from_value(extra).unwrap(), now())
    }

    #[test]
    fn defaults_are_the_contracts() {
        let request = created(json!({})).unwrap();
        assert_eq!(
            (request.memory_bytes, request.hotplug_bytes, request.overlay_bytes),
            (1 << 30, 0, 10 << 30)
        );
        assert_eq!(request.vcpus, 2);
        assert!(request.network.enabled);
        assert_eq!(request.expiry, None);
        assert_eq!(request.hypervisor, None);
    }

    #[test]
    fn each_field_has_its_code() {
        for (body, code) in [
            (json!({"name": "Web"}), "Bad Request"),
            (json!({"name": ""}), "Bad Request"),
            (json!({"image": " "}), "Bad Request"),
            (json!({"vcpus": 0}), "Bad Request"),
            (json!({"vcpus": -1}), "Bad Request"),
            (json!({"size": "1Gb"}), "invalid_size"),
            (json!({"hotplug_size": "x"}), "invalid_hotplug_size"),
            (json!({"overlay_size": "-1"}), "invalid_overlay_size"),
            (json!({"disk_io_bps": "fast"}), "invalid_disk_io_bps"),
            (
                json!({"network": {"bandwidth_download": "x"}}),
                "invalid_bandwidth_download",
            ),
            (
                json!({"network": {"bandwidth_upload": "x"}}),
                "invalid_bandwidth_upload",
            ),
            (json!({"platform": "linux/riscv64"}), "invalid_platform"),
            (json!({"ttl": "soon"}), "invalid_ttl"),
            (json!({"ttl": "-1s"}), "invalid_ttl"),
            (json!({"expires_at": "tomorrow"}), "invalid_expires_at"),
            (
                json!({"expires_at": "2020-01-01T00:00:00Z"}),
                "invalid_expires_at",
            ),
            (
                json!({"ttl": "1h", "expires_at": "2030-01-01T00:00:00Z"}),
                "invalid_request",
            ),
            (json!({"tags": {"": "x"}}), "invalid_request"),
            (json!({"env": {"A=B": "x"}}), "invalid_request"),
            (json!({"env": {"A": "x\0"}}), "invalid_request"),
            (json!({"cmd": ["a\0"]}), "invalid_request"),
            (
                json!({"snapshot_policy": {"compression": {"enabled": true, "algorithm": "lz4", "level": 10}}}),
                "invalid_snapshot_policy",
            ),
            (
                json!({"snapshot_policy": {"standby_compression_delay": "later"}}),
                "invalid_snapshot_policy",
            ),
        ] {
            let error = created(body.clone()).unwrap_err();
            assert_eq!(error.code(), code, "{body}");
        }
    }

    #[test]
    fn what_is_not_there_yet_is_refused_and_not_dropped() {
        for (body, code) in [
            (
                json!({"volumes": [{"volume_id": "v", "mount_path": "/data"}]}),
                "invalid_request",
            ),
            (json!({"devices": ["gpu0"]}), "invalid_request"),
            (json!({"gpu": {"profile": "L40S-1Q"}}), "invalid_request"),
            (
                json!({"network": {"egress": {"enabled": true}}}),
                "invalid_request",
            ),
            (
                json!({"credentials": {"K": {"source": {"env": "K"}, "inject": [{"as": {"header": "h", "format": "${value}"}}]}}}),
                "invalid_request",
            ),
            (json!({"auto_standby": {"enabled": true}}), "invalid_auto_standby"),
            (
                json!({"health_check": {"type": "tcp", "tcp": {"port": 80}}}),
                "invalid_health_check",
            ),
            (
                json!({"health_check": {"type": "none", "tcp": {"port": 80}}}),
                "invalid_health_check",
            ),
            (
                json!({"restart_policy": {"policy": "always"}}),
                "invalid_restart_policy",
            ),
        ] {
            let error = created(body.clone()).unwrap_err();
            assert_eq!(error.code(), code, "{body}");
        }
        let off = json!({
            "auto_standby": {"enabled": false}, "health_check": {"type": "none"}, "gpu": {}, "volumes": [],
            "restart_policy": {"policy": "never"}, "snapshot_policy": {"compression": {"enabled": false}},
            "network": {"enabled": false, "egress": {"enabled": false}}
        });
        assert!(created(off).is_ok());
    }

    #[test]
    fn expiry_has_two_forms() {
        assert_eq!(created(json!({"ttl": "0s"})).unwrap().expiry, Some(Expiry::Never));
        assert_eq!(
            created(json!({"ttl": "1h30m"})).unwrap().expiry,
            Some(Expiry::After(Duration::from_secs(5400)))
        );
        let at = created(json!({"expires_at": "2026-06-02T00:00:00Z"}))
            .unwrap()
            .expiry;
        assert_eq!(at, Some(Expiry::At("2026-06-02T00:00:00Z".parse().unwrap())));
    }

    #[test]
    fn an_update_changes_what_it_can() {
        let parsed = |body: Value| update(&serde_json::from_value(body).unwrap(), now());
        assert_eq!(parsed(json!({})).unwrap().expiry, None);
        assert_eq!(parsed(json!({"ttl": "0s"})).unwrap().expiry, Some(Expiry::Never));
        assert_eq!(
            parsed(json!({"env": {"A": "b"}})).unwrap_err().code(),
            "invalid_request"
        );
        assert_eq!(
            parsed(json!({"restart_policy": {"policy": "always"}}))
                .unwrap_err()
                .code(),
            "invalid_restart_policy"
        );
    }
}
