BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE api_keys (
	id VARCHAR(40) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	created_at FLOAT NOT NULL, user_id VARCHAR(40) DEFAULT 'user_first' NOT NULL, hint VARCHAR(16) DEFAULT '' NOT NULL, scopes JSON DEFAULT '["read", "write", "admin"]' NOT NULL, expires_at FLOAT, revoked_at FLOAT, used_at FLOAT, 
	PRIMARY KEY (id), 
	UNIQUE (hash)
);
INSERT INTO "api_keys" VALUES('key_01M8C20Y6DZDAS0NQ7S5VZZJYY','3d71ba73ce93410973c0e45f1eb97e676347b535402c83306935bd14e8746daa','first',1.79570111098944282528e+09,'user_first','d2ft_old_','["read", "write", "admin"]',NULL,NULL,NULL);
CREATE TABLE artifacts (
	job_id VARCHAR(40) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	path TEXT NOT NULL, 
	bytes BIGINT, 
	sha256 VARCHAR(64), 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (job_id, name), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
CREATE TABLE attempts (
	job_id VARCHAR(40) NOT NULL, 
	n INTEGER NOT NULL, 
	token VARCHAR(40) NOT NULL, 
	submission_id VARCHAR(80) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	events_offset BIGINT NOT NULL, 
	created_at FLOAT NOT NULL, 
	ended_at FLOAT, 
	PRIMARY KEY (job_id, n), 
	FOREIGN KEY(job_id) REFERENCES jobs (id), 
	UNIQUE (submission_id)
);
INSERT INTO "attempts" VALUES('ftjob_01M8C20Y6Y2VYNX4KY9GC1N1ZG',1,'run_iS1Cc2ldHVGq_3nEZAGey-V4GLuTEHAt','job-ftjob_01M8C20Y6Y2VYNX4KY9GC1N1ZG-a1','settled',0,1.79570111102339601515e+09,1.79570111103876948362e+09);
INSERT INTO "attempts" VALUES('ftjob_01M8C20Y870KPD2488DPKG8RBV',1,'run_LNc2XpooZF63KAQ4NQNi0hzfatExdcyE','job-ftjob_01M8C20Y870KPD2488DPKG8RBV-a1','submitted',30,1.79570111105459976198e+09,NULL);
CREATE TABLE checkpoints (
	job_id VARCHAR(40) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	attempt INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	path TEXT NOT NULL, 
	bytes BIGINT, 
	sha256 VARCHAR(64), 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (job_id, name), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "checkpoints" VALUES('ftjob_01M8C20Y870KPD2488DPKG8RBV','step-00000003',1,3,'/x/step-00000003',NULL,NULL,1.79570111106638336181e+09);
CREATE TABLE datasets (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	uri TEXT NOT NULL, 
	summary JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE deliveries (
	id VARCHAR(40) NOT NULL, 
	webhook_id VARCHAR(40) NOT NULL, 
	body JSON NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	tries INTEGER NOT NULL, 
	next_at FLOAT NOT NULL, 
	last_error TEXT, 
	created_at FLOAT NOT NULL, 
	sent_at FLOAT, 
	PRIMARY KEY (id), 
	FOREIGN KEY(webhook_id) REFERENCES webhooks (id)
);
CREATE TABLE events (
	job_id VARCHAR(40) NOT NULL, 
	seq INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	run_seq BIGINT, 
	type VARCHAR(40) NOT NULL, 
	level VARCHAR(10) NOT NULL, 
	message TEXT NOT NULL, 
	data JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (job_id, seq), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "events" VALUES('ftjob_01M8C20Y6Y2VYNX4KY9GC1N1ZG',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79570111100638484958e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y6Y2VYNX4KY9GC1N1ZG',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79570111100638484958e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y6Y2VYNX4KY9GC1N1ZG',3,1,NULL,'job.status','info','attempt 1 begins','{"from": "queued", "to": "planning"}',1.79570111102351498604e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y6Y2VYNX4KY9GC1N1ZG',4,1,NULL,'job.status','info','the cluster has taken the attempt','{"from": "planning", "to": "starting"}',1.7957011110318870544e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y6Y2VYNX4KY9GC1N1ZG',5,1,NULL,'job.status','error','gone','{"from": "starting", "to": "failed", "error": {"code": "driver_died", "fault": "system", "message": "gone", "param": null}}',1.79570111103863525392e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y870KPD2488DPKG8RBV',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79570111104779601097e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y870KPD2488DPKG8RBV',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79570111104779601097e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y870KPD2488DPKG8RBV',3,1,NULL,'job.status','info','attempt 1 begins','{"from": "queued", "to": "planning"}',1.79570111105476403236e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y870KPD2488DPKG8RBV',4,1,NULL,'job.status','info','the cluster has taken the attempt','{"from": "planning", "to": "starting"}',1.79570111105896449091e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y870KPD2488DPKG8RBV',5,1,10,'job.status','info','starting → running','{"from": "starting", "to": "running"}',1.79570111106613397597e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y870KPD2488DPKG8RBV',6,1,20,'metrics','info','','{"step": 3, "total_steps": 8}',1.79570111106631684306e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y870KPD2488DPKG8RBV',7,1,30,'checkpoint.saved','info','','{"name": "step-00000003", "path": "/x/step-00000003", "step": 3}',1.7957011110704250335e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y96YKP3EDX4P2AAAZ81',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79570111107871913905e+09);
INSERT INTO "events" VALUES('ftjob_01M8C20Y96YKP3EDX4P2AAAZ81',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79570111107871913905e+09);
CREATE TABLE job_labels (
	job_id VARCHAR(40) NOT NULL, 
	"key" VARCHAR(64) NOT NULL, 
	value VARCHAR(512) NOT NULL, 
	PRIMARY KEY (job_id, "key"), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
CREATE TABLE jobs (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	idempotency_key VARCHAR(255), 
	fingerprint VARCHAR(64) NOT NULL, 
	spec JSON NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	status_reason TEXT, 
	attempt INTEGER NOT NULL, 
	last_seq INTEGER NOT NULL, 
	live JSON, 
	estimate JSON, 
	error JSON, 
	"plan" JSON, 
	ledger JSON, 
	created_at FLOAT NOT NULL, 
	started_at FLOAT, 
	finished_at FLOAT, model VARCHAR(200) DEFAULT '' NOT NULL, search TEXT DEFAULT '' NOT NULL, trace VARCHAR(64), priority INTEGER DEFAULT '0' NOT NULL, queued_at FLOAT, queue_deadline FLOAT, want VARCHAR(16), requeue BOOLEAN DEFAULT 0 NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "jobs" VALUES('ftjob_01M8C20Y6Y2VYNX4KY9GC1N1ZG','user_first',NULL,'070856d5b3693f118da182b4cf0efdb854cd8511f7c55c582707bd69a33b4258','{"name": "failed", "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "workers": 2, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 8, "window": 100, "placement": "auto", "train_embed": true, "seed": 0, "priority": 0, "queue_timeout_s": null, "metadata": {}}','failed',NULL,1,5,NULL,NULL,'{"code": "driver_died", "fault": "system", "message": "gone", "param": null}',NULL,NULL,1.79570111100638484958e+09,1.795701111023349762e+09,1.79570111103608918189e+09,'d2ft_digits','ftjob_01m8c20y6y2vynx4ky9gc1n1zg
failed
d2ft_digits
digits',NULL,0,1.79570111100638484958e+09,NULL,NULL,0);
INSERT INTO "jobs" VALUES('ftjob_01M8C20Y870KPD2488DPKG8RBV','user_first',NULL,'50bb6ff10d51789afdd2273885ec7580bfd3b55e06ce71b7973a39d8c61b89c0','{"name": "runs", "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "workers": 2, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 8, "window": 100, "placement": "auto", "train_embed": true, "seed": 0, "priority": 0, "queue_timeout_s": null, "metadata": {}}','running',NULL,1,7,'{"metrics": {"step": 3, "total_steps": 8}, "steps_seen": 1, "compute_fraction_sum": 0.0, "compute_fraction_count": 0, "bytes_fraction_sum": 0.0, "bytes_fraction_count": 0, "step_seconds_sum": 0.0, "step_seconds_count": 0, "step_average": null}',NULL,NULL,NULL,NULL,1.79570111104779601097e+09,1.79570111105453586583e+09,NULL,'d2ft_digits','ftjob_01m8c20y870kpd2488dpkg8rbv
runs
d2ft_digits
digits',NULL,0,1.79570111104779601097e+09,NULL,NULL,0);
INSERT INTO "jobs" VALUES('ftjob_01M8C20Y96YKP3EDX4P2AAAZ81','user_first',NULL,'4dddc530458799efefbd217699ea705dcf679b094aba36e63cca857022e0d865','{"name": "waits", "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "workers": 2, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 8, "window": 100, "placement": "auto", "train_embed": true, "seed": 0, "priority": 0, "queue_timeout_s": null, "metadata": {}}','queued',NULL,0,2,NULL,NULL,NULL,NULL,NULL,1.79570111107871913905e+09,NULL,NULL,'d2ft_digits','ftjob_01m8c20y96ykp3edx4p2aaaz81
waits
d2ft_digits
digits',NULL,0,1.79570111107871913905e+09,NULL,NULL,0);
CREATE TABLE leases (
	name VARCHAR(40) NOT NULL, 
	holder VARCHAR(80) NOT NULL, 
	until FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
CREATE TABLE metrics (
	job_id VARCHAR(40) NOT NULL, 
	step INTEGER NOT NULL, 
	"values" JSON NOT NULL, 
	PRIMARY KEY (job_id, step), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "metrics" VALUES('ftjob_01M8C20Y870KPD2488DPKG8RBV',3,'{"step": 3, "total_steps": 8}');
CREATE TABLE users (
	id VARCHAR(40) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	role VARCHAR(16) NOT NULL, 
	max_queued INTEGER, 
	max_running INTEGER, 
	max_priority INTEGER DEFAULT '0' NOT NULL, 
	share FLOAT DEFAULT '1' NOT NULL, 
	usage_s FLOAT DEFAULT '0' NOT NULL, 
	usage_at FLOAT DEFAULT '0' NOT NULL, 
	created_at FLOAT NOT NULL, 
	disabled_at FLOAT, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
INSERT INTO "users" VALUES('user_first','admin','admin',NULL,NULL,100,1.0,4.2065143585205078125e-02,1.79570111104442858701e+09,1.79570111093639540669e+09,NULL);
CREATE TABLE webhooks (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	url TEXT NOT NULL, 
	types JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	disabled_at FLOAT, 
	PRIMARY KEY (id)
);
CREATE INDEX ix_jobs_created ON jobs (created_at, id);
CREATE INDEX ix_jobs_state ON jobs (state, created_at);
CREATE UNIQUE INDEX ux_jobs_idempotency ON jobs (owner, idempotency_key);
CREATE INDEX ix_attempts_state ON attempts (state);
CREATE UNIQUE INDEX ux_events_run ON events (job_id, attempt, run_seq);
CREATE INDEX ix_api_keys_user ON api_keys (user_id);
CREATE INDEX ix_jobs_owner ON jobs (owner, created_at, id);
CREATE INDEX ix_jobs_queue ON jobs (state, owner, priority, queued_at);
CREATE INDEX ix_job_labels ON job_labels ("key", value, job_id);
CREATE UNIQUE INDEX ux_datasets_name ON datasets (owner, name);
CREATE INDEX ix_webhooks_owner ON webhooks (owner);
CREATE INDEX ix_deliveries_due ON deliveries (state, next_at);
CREATE INDEX ix_deliveries_webhook ON deliveries (webhook_id);
CREATE INDEX ix_attempts_token ON attempts (token);
COMMIT;
